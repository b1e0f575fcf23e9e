"""torch.export: the whole network, our operations inside, for PyTorch without its Python; or compiled by AOTInductor.

The file loads in any process that has imported `imgopt_fast.nn`, which registers the operations. With `aoti=True` it
is an AOTInductor package instead: C++ around the same operations, compiled for this machine. The check runs in a fresh
process, `python -m imgopt_fast.targets.pt2 FILE`.
"""

import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imgopt_fast.nn import Int8Segment
from imgopt_fast.targets.fresh_process import Arrays, FreshProcess, median_seconds, serve
from imgopt_fast.targets.network import Network, Value
from imgopt_fast.targets.verification import Engine

PACKAGES, VERIFIERS, EXTRA = (), (), ""


@dataclass(frozen=True, eq=False)
class Traced(Network):
    """A network whose layers torch.export writes down by itself: of the description only the ends are needed."""

    model: nn.Module

    @property
    def rounds(self) -> bool:
        return any(isinstance(module, Int8Segment) for module in self.model.modules())


def describe(model: nn.Module, images: Tensor) -> Traced:
    """The ends of any model: one tensor in, a tensor or a sequence of them out."""
    with torch.no_grad():
        result = model.eval()(images)
    tensors = [result] if isinstance(result, Tensor) else list(result.values() if isinstance(result, dict) else result)
    values = [Value("images", tuple(images.shape), images.dtype)]
    values += [Value(f"output_{i}", tuple(t.shape), t.dtype) for i, t in enumerate(tensors)]
    outputs = tuple(range(1, len(values)))
    return Traced(values, [], 0, outputs, frozenset(), False, images, [images, *tensors], model)


def write(network: Network, path: Path, *, aoti: bool = False) -> list[str]:
    """Write the file `path`, whose name ends in .pt2. Raises ValueError where torch cannot trace or compile."""
    assert isinstance(network, Traced)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name!r}")
    images = network.images if len(network.images) > 1 else network.images.expand(2, -1, -1, -1)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # torch's own
            shapes = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(network.model, (images,), dynamic_shapes=shapes)
            if not aoti:
                torch.export.save(program, path)
                return []
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as refusal:  # torch raises what the model's own code raises, too
        what = "AOTInductor cannot compile" if aoti else "torch.export cannot trace"
        raise ValueError(
            f"pt2: {what} {type(network.model).__name__}: {str(refusal).strip().splitlines()[0]}; make the network "
            f"independent of the values of tensors{', or leave aoti out' if aoti else ''}"
        ) from refusal
    return ["an AOTInductor package, for processors like this one"]


def engines(path: Path, network: Network, *, aoti: bool = False) -> list[Engine]:
    """A fresh Python process that loads the file."""
    name = f"torch {torch.__version__}, {'AOTInductor' if aoti else 'torch.export'}, fresh process"
    kind = "aoti" if aoti else "export"
    call = FreshProcess(name, [sys.executable, "-m", __name__, str(path), kind, str(torch.get_num_threads())])
    return [Engine(name, lambda x: call(x)[:-1], exact=not aoti, seconds=lambda x: float(call(x)[-1]))]


def _serve(path: str, kind: str, threads: str) -> None:
    """Run the file on what comes in; the last array that goes out is the time of an image."""
    import imgopt_fast.nn  # noqa: F401  registers the operations

    torch.set_num_threads(int(threads))
    model: Any
    model = torch._inductor.aoti_load_package(path) if kind == "aoti" else torch.export.load(path).module()

    def run(arrays: Arrays) -> Arrays:
        images = torch.from_numpy(arrays[0].copy())
        with torch.no_grad():
            result = model(images)
            tensors = [result] if isinstance(result, Tensor) else list(result)
            seconds = median_seconds(partial(model, images)) if len(images) == 1 else 0.0
        return [*(tensor.numpy() for tensor in tensors), np.array(seconds)]

    serve(run)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
