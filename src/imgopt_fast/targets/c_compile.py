"""The C99 folder in the hands of this machine's compiler: what checks that it gives the network's bits."""

import os
import re
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from imgopt_fast.targets.network import Network
from imgopt_fast.targets.verification import Array, Engine

FLAGS = ("-std=c99", "-O2", "-pedantic", "-Wall", "-Wextra", "-Werror")


def engines(path: Path, network: Network, **options: Any) -> list[Engine]:
    """The compiler of this machine on the folder `path`: $CC, cc or gcc. ValueError where there is none."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        raise ValueError("c: no C compiler found; set CC, or take verify=False (--no-verify)")
    first = next(layer for layer in network.layers if layer.kind == "quantize")
    stored = network.values[first.output]
    exponent = int(re.findall(r"OUTPUT_EXPONENT (-?\d+)", (path / "model.h").read_text())[0])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    build = Path(tempfile.mkdtemp())
    program = build_program(path, build, compiler, FLAGS)
    subprocess.run([program], check=True, capture_output=True)  # the golden vectors

    def call(images: Array) -> tuple[Array, str]:
        steps = np.round(images * np.float32(1.0 / stored.scale)) + stored.zero_point
        quantized = steps.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        run = subprocess.run([program, "-"], input=quantized.tobytes(), capture_output=True, check=True)
        sums = np.frombuffer(run.stdout, np.int32).reshape(len(images), *network.values[network.outputs[0]].shape[1:])
        return (sums * 2.0**-exponent).astype(np.float32), run.stderr.decode()

    def seconds(image: Array) -> float:
        return float(call(np.repeat(image, 20, 0))[1].split()[0]) / 20 * 1e-6

    weakref.finalize(call, shutil.rmtree, build)
    return [Engine(f"C99, {version}", lambda images: [call(images)[0]], exact=True, seconds=seconds)]


def build_program(folder: Path, build: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """Compile the folder; ValueError with the compiler's words where that fails."""
    program = build / "check"
    files = [str(folder / name) for name in ("model.c", "weights.c", "main.c")]
    result = subprocess.run([compiler, *flags, *files, "-o", str(program)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"c: {compiler} refuses the code: {result.stderr}")
    return program
