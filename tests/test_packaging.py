"""The wheel: what it exports, and what a user without a compiler gets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BACKEND, require

from imgopt_fast import _native

ROOT = Path(__file__).parent.parent
needs_native = pytest.mark.skipif(BACKEND != "native", reason=f"the {BACKEND} backend is forced")


def run(*command: str | Path, **env: str | None) -> subprocess.CompletedProcess[str]:
    merged = {k: v for k, v in {**os.environ, **env}.items() if v is not None}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=merged)


@needs_native
def test_isa_units_export_one_function_and_nothing_weak() -> None:
    """A weak symbol of a unit that is compiled with AVX flags could be the copy that the linker keeps for all."""
    units = [
        unit
        for unit in ROOT.glob("build/*/CMakeFiles/imgopt_kernels.dir/csrc/*/*.o")
        if unit.stem.removesuffix(".cpp") in ("scalar", "avx2", "avxvnni", "avx512", "neon")
    ]
    require(bool(units), "the object files of a build in this checkout")
    for unit in units:
        symbols = run("nm", "--defined-only", "--extern-only", "-C", unit).stdout.splitlines()
        kinds = [line.split(maxsplit=2)[1] for line in symbols]
        assert kinds == ["T"], f"{unit.parent.name}/{unit.name} exports {symbols}"


@needs_native
def test_kernel_library_exports_only_its_api() -> None:
    library = _native.find_library("libimgopt_kernels.so")
    assert library is not None
    exported = {
        line.split(maxsplit=2)[2].split("(")[0]
        for line in run("nm", "-D", "-C", "--defined-only", library).stdout.splitlines()
        if " imgopt::" in line
    }
    assert exported == {
        f"imgopt::{name}" for name in ("kernels", "supported_isas", "active_isa", "set_isa", "thread_scratch")
    }


@needs_native
def test_libraries_find_each_other_by_origin_and_name_no_build_path() -> None:
    for name in ("_torch_ops.so", "libimgopt_kernels.so"):
        library = _native.find_library(name)
        assert library is not None
        assert str(ROOT).encode() not in library.read_bytes()
    dynamic = run("readelf", "-d", _native.find_library("_torch_ops.so") or "").stdout
    assert "[$ORIGIN]" in dynamic
    assert "libpython" not in dynamic
    assert "libtorch_cpu.so" in dynamic


@needs_native
def test_stub_of_core_is_current(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "pybind11_stubgen", "imgopt_fast._core", "-o", tmp_path)
    assert result.returncode == 0, result.stderr
    fresh = (tmp_path / "imgopt_fast" / "_core.pyi").read_text()
    committed = (ROOT / "src" / "imgopt_fast" / "_core.pyi").read_text()
    assert fresh == committed, "run: make stub"


USE_ALL_THREE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import imgopt_fast.ops
    import imgopt_fast.ops
    from imgopt_fast import _native
print(_native.backend(), sum("without its compiled kernels" in str(w.message) for w in caught))
import torch, imgopt_fast
images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
print(torch.equal(imgopt_fast.affine_warp(images, identity), images))
weight = torch.ones(4, 3, 1, 1, dtype=torch.int8)
out = imgopt_fast.int8_conv2d(images, weight, input_scale=1.0, weight_scale=1.0)
print(torch.equal(out, images.float().sum(1, keepdim=True).expand(2, 4, 5, 7)))
x, w = torch.arange(6.0).reshape(2, 3), torch.ones(4, 3)
mask = torch.tensor([[True, False, True]]).expand(4, 3)
print(torch.equal(imgopt_fast.masked_matmul(x, w, mask), (x[:, :1] + x[:, 2:]).expand(2, 4)))
"""


def test_without_a_compiler_the_wheel_is_pure_and_numba_serves(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    no_compiler = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PIP_CONSTRAINT": None}
    source = tmp_path / "source"
    files = run("git", "-C", ROOT, "ls-files", "-z").stdout.split("\0")
    for name in filter(None, files):  # a copy: the build must not touch the build folder of this checkout
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())

    failed = run(*build, "-w", tmp_path, source, IMGOPT_REQUIRE_NATIVE="1", **no_compiler)
    assert failed.returncode != 0, "IMGOPT_REQUIRE_NATIVE=1 must make a failed compile fatal"

    built = run(*build, "-w", tmp_path, source, IMGOPT_REQUIRE_NATIVE=None, **no_compiler)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("imgopt_fast-*.whl")
    assert re.search(r"py3-none-any\.whl$", wheel.name)

    site = tmp_path / "site"
    installed = run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    assert installed.returncode == 0, installed.stderr
    used = run(sys.executable, "-c", USE_ALL_THREE, PYTHONPATH=str(site), IMGOPT_BACKEND=None, IMGOPT_ISA=None)
    assert used.stdout.split("\n")[:4] == ["numba 1", "True", "True", "True"], used.stderr
