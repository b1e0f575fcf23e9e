"""A quantized segment as data: the format that C++ and Python both read; builder.py writes it.

A plan is one int64 tensor, so that a program pickles, moves and compares like any tensor, and so that the runner needs
no Python. Sizes (N, H, W) are not in it: they are resolved when it runs, and the arena is laid out then.

    header   MAGIC, VERSION, inputs, values, outputs, steps, shift (0 or 1), 0
    inputs   value id each
    values   rank (2 or 4), channels (-1: known when it runs), dtype (DTYPES), zero point
    outputs  value id each
    steps    opcode, words of this step, output value, inputs, input values..., parameters (PARAMETERS)...

float32 parameters are bit patterns. Names that end in `_at` are byte offsets into `constants` (in `packed` for
`packed_at`). Per-channel arrays are followed by CHANNEL_SLACK readable entries: a vector kernel reads whole groups.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imgopt_fast.ops import int8_conv2d as conv
from imgopt_fast.ops.int8_graph.constants import Blob

MAGIC, VERSION = 0x38544E49, 1
HEADER_WORDS, VALUE_WORDS, STEP_WORDS = 8, 4, 4
DTYPES = (torch.uint8, torch.int8, torch.float32)

QUANTIZE, CONV, ADD, MAX_POOL, AVG_POOL, CONCAT, FLATTEN, DEQUANTIZE = range(8)
_WINDOW = ("kernel_h", "kernel_w", "stride_h", "stride_w", "top", "bottom", "left", "right")
PARAMETERS: dict[int, tuple[str, ...]] = {
    QUANTIZE: ("inverse_scale", "low", "high"),
    # `multiplier_at` holds float32 factors, or (right, sum_left, residual_left, 0) int8 shifts where the plan shifts.
    CONV: ("out_channels", "group_channels", *_WINDOW, "dilation_h", "dilation_w", "groups", "weight_at", "packed_at",
           "bias_at", "offset_at", "multiplier_at", "low", "high", "residual_multiplier"),
    ADD: ("multiplier_a", "multiplier_b", "left_shift_a", "left_shift_b", "right_shift", "low", "high"),
    MAX_POOL: _WINDOW,
    # kernel_h = 0: the whole image. The ratio input scale / output scale is a float64 bit pattern.
    AVG_POOL: (*_WINDOW, "count_padding", "ratio", "right_shift", "low", "high"),
    CONCAT: ("low", "high"),  # then multiplier and right shift of every input
    FLATTEN: (),
    DEQUANTIZE: ("scale",),
}  # fmt: skip


class Int8Program(NamedTuple):
    """A built segment; `int8_graph` runs it. Only tensors and ints: it pickles, deep-copies and traces."""

    plan: Tensor  # int64, the format above
    constants: Tensor  # uint8: canonical int8 weights, biases, offsets, multipliers
    packed: Tensor  # uint8: the weights in the order of one instruction set; may be empty or another machine's
    inputs: tuple[int, ...]  # rank, channels, dtype (index into DTYPES) of every input
    outputs: tuple[int, ...]  # how to get every output's shape from the inputs', see `output_shapes`


class Step(NamedTuple):
    """One decoded step of a plan."""

    opcode: int
    output: int
    inputs: tuple[int, ...]
    parameters: dict[str, int]
    extra: tuple[int, ...]  # CONCAT: multiplier and right shift of every input
    at: int  # word at which the parameters begin


class Plan(NamedTuple):
    """A decoded plan, for the interpreters in Python."""

    shift: bool
    inputs: list[int]
    outputs: list[int]
    values: list[tuple[int, int, torch.dtype, int]]  # rank, channels, dtype, zero point
    steps: list[Step]


def decode(plan: Tensor) -> Plan:
    """Read a plan; ValueError if it is none."""
    words: list[int] = plan.tolist()
    if len(words) < HEADER_WORDS or words[0] != MAGIC or words[1] != VERSION:
        raise ValueError(f"plan: expected a program of version {VERSION} from Int8GraphBuilder.build")
    _, _, n_inputs, n_values, n_outputs, n_steps, shift, _ = words[:HEADER_WORDS]
    at = HEADER_WORDS
    inputs, at = words[at : at + n_inputs], at + n_inputs
    records = [words[at + VALUE_WORDS * i : at + VALUE_WORDS * (i + 1)] for i in range(n_values)]
    values = [(rank, channels, DTYPES[dtype], zero) for rank, channels, dtype, zero in records]
    at += VALUE_WORDS * n_values
    outputs, at = words[at : at + n_outputs], at + n_outputs
    steps = []
    for _ in range(n_steps):
        opcode, length, output, count = words[at : at + STEP_WORDS]
        first = at + STEP_WORDS + count
        names = PARAMETERS[opcode]
        parameters = dict(zip(names, words[first : first + len(names)], strict=True))
        extra = tuple(words[first + len(names) : at + length])
        steps.append(Step(opcode, output, tuple(words[at + STEP_WORDS : first]), parameters, extra, first))
        at += length
    return Plan(bool(shift), inputs, outputs, values, steps)


def float_of(bits: int) -> float:
    """The float32 of a parameter."""
    value: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]
    return value


def double_of(bits: int) -> float:
    """The float64 of a parameter."""
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value


def output_shapes(outputs: Sequence[int], inputs: Sequence[Sequence[int]]) -> list[tuple[list[int], torch.dtype]]:
    """Shape and dtype of every output, from the shapes of the inputs.

    `outputs` holds, for each: rank, channels, dtype, the input whose batch and size it follows, flattened (0 or 1), a
    count, and as many windows (height, stride, padding, width, stride, padding); a window of height 0 is a global pool.
    """
    found = []
    at = 0
    while at < len(outputs):
        rank, channels, dtype, source, flattened, count = outputs[at : at + 6]
        at += 6
        shape = inputs[source]
        size = list(shape[2:]) if len(shape) == 4 else [1, 1]
        for _ in range(count):
            for axis in (0, 1):
                window, stride, padding = outputs[at + 3 * axis : at + 3 * axis + 3]
                size[axis] = (size[axis] + padding - window) // stride + 1 if window else 1
                if isinstance(size[axis], int) and size[axis] < 1:
                    raise ValueError(f"inputs: expected a larger image, {tuple(shape)} leaves no output")
            at += 6
        if rank == 4:
            found.append(([shape[0], channels, *size], DTYPES[dtype]))
        else:
            found.append(([shape[0], channels * size[0] * size[1] if flattened else channels], DTYPES[dtype]))
    return found


def repack(program: Int8Program) -> Int8Program:
    """`program` with its weights in the order of its device's kernel, for one that came from another machine."""
    plan = program.plan.clone()
    blob, rows = Blob(), False
    for step in decode(plan).steps:
        if step.opcode != CONV:
            continue
        p = step.parameters
        block = conv.pack_bytes(conv_weight(program.constants, p), p["groups"])
        rows = block.dim() == 2  # CUDA's: the blob then has two axes as well
        packed_at = blob.add(block)
        plan[step.at + PARAMETERS[CONV].index("packed_at")] = packed_at
    packed = blob.tensor().to(program.constants.device)
    return program._replace(plan=plan, packed=packed[None] if rows else packed)


def conv_weight(constants: Tensor, p: dict[str, int]) -> Tensor:
    """The canonical int8 weight (O, C/groups, kH, kW) of a CONV step."""
    shape = (p["out_channels"], p["group_channels"], p["kernel_h"], p["kernel_w"])
    at = p["weight_at"]
    return constants[at : at + math.prod(shape)].view(torch.int8).view(shape)


def channel_array(constants: Tensor, at: int, channels: int, dtype: torch.dtype) -> Tensor:
    """A per-channel array of 4-byte entries in the constants."""
    return constants[at : at + 4 * channels].view(dtype)
