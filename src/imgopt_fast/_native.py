"""Finds and loads the compiled libraries, and decides which backend serves the operations.

`native` is the C++ kernels, `numba` their just-in-time twins, `reference` plain torch. IMGOPT_BACKEND forces one;
otherwise it is native where the libraries are there, and Numba, after one warning, where they are not (a package
that was installed without a compiler). Decided once per process, at import.
"""

import importlib
import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, cast

import imgopt_fast

Backend = Literal["native", "numba", "reference"]
BACKENDS: tuple[Backend, ...] = ("native", "numba", "reference")


def find_library(name: str) -> Path | None:
    """The installed library `name`, or None.

    An editable install spreads the package over two folders, so the search follows `__path__`, not `__file__`.
    """
    for folder in imgopt_fast.__path__:
        path = Path(folder) / name
        if path.is_file():
            return path
    return None


@cache
def core() -> ModuleType | None:
    """The pybind11 module `_core`, or None where the package has no compiled part."""
    try:
        return importlib.import_module("imgopt_fast._core")
    except ModuleNotFoundError:
        return None


@cache
def backend() -> Backend:
    """The backend of this process.

    Raises ValueError when IMGOPT_BACKEND or IMGOPT_ISA names something that does not exist, and ImportError when
    IMGOPT_BACKEND=native finds no compiled libraries.
    """
    wanted = os.environ.get("IMGOPT_BACKEND", "")
    if wanted and wanted not in BACKENDS:
        raise ValueError(f"IMGOPT_BACKEND: expected one of {', '.join(BACKENDS)}, got {wanted!r}")
    compiled = core()
    if compiled is not None:
        compiled.active_isa()  # a wrong IMGOPT_ISA is an error here, at import, not in the middle of a training
    if wanted == "native" and compiled is None:
        raise ImportError("IMGOPT_BACKEND=native, but imgopt_fast was installed without its compiled libraries")
    if not wanted and compiled is None:
        warnings.warn(
            "imgopt_fast was installed without its compiled kernels; Numba serves the operations, several times "
            "slower. `imgopt-fast doctor` says what is missing; IMGOPT_BACKEND=numba silences this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return cast(Backend, wanted) or ("numba" if compiled is None else "native")


def active_isa() -> str | None:
    """Name of the instruction set that the kernels use, None without compiled kernels."""
    compiled = core()
    return None if compiled is None else cast(str, compiled.active_isa())


def supported_isas() -> list[str]:
    """Instruction sets of this build that the processor has, the best one last; empty without compiled kernels."""
    compiled = core()
    return [] if compiled is None else cast(list[str], compiled.supported_isas())


def set_isa(name: str) -> None:
    """Use instruction set `name` from now on; ValueError if the build or the processor lacks it."""
    compiled = core()
    if compiled is None:
        raise ValueError(f"name: there are no compiled kernels to switch to {name!r}")
    compiled.set_isa(name)


@cache
def load_torch_ops() -> None:
    """Register the compiled kernels with torch's dispatcher: the CPU ones, and CUDA's where there is a device."""
    import torch

    if backend() != "native":
        return
    library = find_library("_torch_ops.so")
    if library is None:
        raise ImportError("imgopt_fast._core is installed but _torch_ops.so is not: reinstall the package")
    torch.ops.load_library(str(library))
    cuda = find_library("_torch_ops_cuda.so")
    if cuda is not None and torch.cuda.is_available():
        torch.ops.load_library(str(cuda))
