"""NEON kernels against the scalar ones in an emulator, where a cross compiler and an emulator are installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

FLAGS = ["-O1", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-trapping-math", "-static"]


def compared(operation: str, folder: Path) -> str:
    """What neon_<operation>.cpp says of the two units of `operation`; compiled in `folder`. Skips without the tools."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    tests, program = Path(__file__).parent, folder / "compare"
    csrc = tests.parent / "csrc"
    sources = [tests / f"neon_{operation}.cpp", *(csrc / operation / f"{isa}.cpp" for isa in ("neon", "scalar"))]
    command = [compiler, *FLAGS, "-march=armv8.2-a+dotprod+fp16", f"-I{csrc}", *sources, "-o", program]
    subprocess.run(command, check=True, timeout=300)
    found = subprocess.run([emulator, program], capture_output=True, text=True, timeout=300, check=False)
    return found.stdout + found.stderr
