"""The CUDA kernels without a device: compiled for the processor, run by the emulator, tested by TESTS.

What this finds: wrong indices, fragments, tails, borders, epilogues, missing barriers. What it cannot: speed, and
whatever differs between nvcc's code and g++'s.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import BACKEND, require

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_cuda.py", *(f"tests/test_cuda_{op}.py" for op in ("affine_warp", "int8_conv2d", "masked_matmul"))]
SOURCES = [*sorted(ROOT.glob("csrc/*/cuda.cu")), ROOT / "csrc" / "int8_graph" / "plan.cpp"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources as a library for the processor; about 20 s on one core."""
    compiler = shutil.which("g++")
    require(compiler is not None, "g++")
    spec = find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch_folder = Path(spec.submodule_search_locations[0])
    folder = tmp_path_factory.mktemp("emulated")
    built = folder / "_torch_ops_cuda_emulated.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-mfma"] if platform.machine() == "x86_64" else []
    defines = ["-DIMGOPT_CUDA_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    paths = ["-isystem", str(torch_folder / "include"), "-I", str(ROOT / "tests" / "cuda_emulator")]

    def compiled(source: Path) -> str:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        command = [str(compiler), *flags, *defines, *paths, "-x", "c++", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, SOURCES))
    link = ["-shared", *objects, "-L", str(torch_folder / "lib"), "-l:libtorch_cpu.so", "-o", str(built)]
    result = subprocess.run([str(compiler), *link], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return built


@pytest.mark.skipif(BACKEND != "native", reason=f"the {BACKEND} backend is forced")
def test_the_cuda_tests_pass_on_the_emulator(library: Path) -> None:
    # The reference backend leaves the CPU's kernels out: the emulated ones take their place.
    env = {**os.environ, "IMGOPT_BACKEND": "reference", "IMGOPT_CUDA_EMULATED": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *TESTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
