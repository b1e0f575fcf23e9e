"""A whole int8 segment (convolutions, linears, adds, pools, concats) run by one call over one arena.

A network of forty small layers spends more time between its layers than in them when each is a call of its own. A
program is written once by `Int8GraphBuilder`; its batch and image size are free. Inference only.
"""

import torch
from torch import Tensor

from imgopt_fast.ops import registration
from imgopt_fast.ops.int8_graph import reference
from imgopt_fast.ops.int8_graph.builder import Int8GraphBuilder
from imgopt_fast.ops.int8_graph.plan import DTYPES, Int8Program, output_shapes, repack

__all__ = ["Int8GraphBuilder", "Int8Program", "int8_graph", "repack"]


def int8_graph(inputs: list[Tensor], program: Int8Program) -> list[Tensor]:
    """Run `program`.

    Args:
        inputs: one tensor per declared input, in the order of the declarations: float32 for `quantize`, the declared
            integer dtype for `input`; (N, C, H, W), channels_last preferred, or (N, C).
        program: what `Int8GraphBuilder.build` returned.

    Returns the outputs given to `build`; images are in channels_last memory. Every step is bit-equal to the formulas
    in the builder's methods on every backend, instruction set and thread count.

    Raises:
        TypeError: an input's dtype is not the declared one.
        ValueError: an input's shape does not fit, or the image is too small for the network.
    """
    _check_inputs(inputs, program)
    try:
        results: list[Tensor] = _op(inputs, program.plan, program.constants, program.packed, list(program.outputs))
    except RuntimeError as refusal:
        output_shapes(program.outputs, [x.shape for x in inputs])  # says it better, if it is the image size
        _, ours, said = str(refusal).partition("runner.h:")  # what only a run can see
        if ours:
            raise ValueError(said.partition(", ")[2]) from refusal
        raise
    return results


def _check_inputs(inputs: list[Tensor], program: Int8Program) -> None:
    expected = len(program.inputs) // 3
    if len(inputs) != expected:
        raise ValueError(f"inputs: expected {expected} tensors, got {len(inputs)}")
    for i, x in enumerate(inputs):
        rank, channels, dtype = program.inputs[3 * i : 3 * i + 3]
        if x.dtype != DTYPES[dtype]:
            raise TypeError(f"inputs[{i}]: expected {DTYPES[dtype]}, got {x.dtype}")
        if x.dim() != rank or x.shape[1] != channels:
            size = ", H, W" if rank == 4 else ""
            raise ValueError(f"inputs[{i}]: expected (N, {channels}{size}), got {tuple(x.shape)}")
        if x.device != program.constants.device:
            raise ValueError(f"inputs[{i}]: expected on the program's {program.constants.device}, got {x.device}")


def _fake(inputs: list[Tensor], plan: Tensor, constants: Tensor, packed: Tensor, outputs: list[int]) -> list[Tensor]:
    shapes = output_shapes(outputs, [x.shape for x in inputs])
    return [
        torch.empty(
            shape,
            dtype=dtype,
            device=inputs[0].device,
            memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format,
        )
        for shape, dtype in shapes
    ]


_op = registration.register(
    "int8_graph(Tensor[] inputs, Tensor plan, Tensor constants, Tensor packed, int[] outputs) -> Tensor[]",
    reference=reference.int8_graph,
    fallback="int8_graph:int8_graph",
    fake=_fake,
)
