"""A quantized segment as data: the builder that writes a plan, and the format that C++ and Python both read.

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
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from imgopt_fast import _arguments as arguments
from imgopt_fast.ops import int8_conv2d as conv
from imgopt_fast.ops.int8_conv2d import reference as arithmetic

MAGIC, VERSION = 0x38544E49, 1
HEADER_WORDS, VALUE_WORDS, STEP_WORDS = 8, 4, 4
DTYPES = (torch.uint8, torch.int8, torch.float32)
CHANNEL_SLACK = 64
ALIGNMENT = 64  # bytes, of every block in `constants` and `packed`

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
# A float output has no zero point and nothing to saturate at: these bounds leave it as it is.
_F32_MAX = 3.4028234663852886e38


class Int8Program(NamedTuple):
    """A built segment; `int8_graph` runs it. Only tensors and ints: it pickles, deep-copies and traces."""

    plan: Tensor  # int64, the format above
    constants: Tensor  # uint8: canonical int8 weights, biases, offsets, multipliers
    packed: Tensor  # uint8: the weights in the order of one instruction set; may be empty or another machine's
    inputs: tuple[int, ...]  # rank, channels, dtype (index into DTYPES) of every input
    outputs: tuple[int, ...]  # how to get every output's shape from the inputs', see `output_shapes`


class ValueInfo(NamedTuple):
    """What a builder knows of a value; `channels` is None where they are known only when the program runs."""

    rank: int
    channels: int | None
    dtype: torch.dtype
    scale: float
    zero_point: int


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
    blob, rows = _Blob(), False
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


@dataclass
class _Value:
    rank: int
    channels: int | None
    dtype: torch.dtype
    scale: float
    zero_point: int
    source: int  # the input whose batch and size it follows
    windows: tuple[int, ...] = ()  # as in `output_shapes`
    flattened: int = 0  # channels of the image that it was, where its own are known only when it runs
    place: int = -1  # its number in the plan, which it shares with what `reread` makes of it


@dataclass
class _Blob:
    """Blocks of bytes, each aligned, in one tensor."""

    blocks: list[Tensor] = field(default_factory=list)
    size: int = 0

    def add(self, block: Tensor) -> int:
        at = self.size
        flat = block.detach().cpu().contiguous().view(-1)
        raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        self.blocks += [raw, torch.zeros(-raw.numel() % ALIGNMENT, dtype=torch.uint8)]
        self.size += raw.numel() + (-raw.numel() % ALIGNMENT)
        return at

    def tensor(self) -> Tensor:
        return torch.cat(self.blocks) if self.blocks else torch.empty(0, dtype=torch.uint8)


class Int8GraphBuilder:
    """Writes a program step by step; every method returns the id of the value that it makes.

    Scales and zero points are those of `int8_conv2d`: real = (value - zero_point) * scale, uint8 or int8, per tensor.
    `requantize="shift"` makes every step integer-only; every scale must then be a power of two.
    Methods raise ValueError or TypeError that names the argument.
    """

    def __init__(self, requantize: Literal["float", "shift"] = "float") -> None:
        if requantize not in ("float", "shift"):
            raise ValueError(f"requantize: expected 'float' or 'shift', got {requantize!r}")
        self._shift = requantize == "shift"
        self._values: list[_Value] = []
        self._places = 0
        self._inputs: list[int] = []
        self._steps: list[list[int]] = []
        self._constants = _Blob()
        self._packed = _Blob()

    def quantize(
        self, *, channels: int, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8, rank: int = 4
    ) -> int:
        """Declare the next input, float32 (N, C, H, W) (or (N, C) with `rank=2`); the id of its quantized form.

        q = round_half_even(clamp(x * f32(1 / scale), lo, hi)) + zero_point; NaN becomes the least value.
        """
        self._check_quantization("", scale, zero_point, dtype)
        _check_rank(rank)
        _check_channels(channels)
        real = self._new(_Value(rank, channels, torch.float32, 1.0, 0, len(self._inputs)))
        self._inputs.append(real)
        low, high = arithmetic.clamp_range(dtype, scale, zero_point, None, None)
        value = _Value(rank, channels, dtype, scale, zero_point, self._values[real].source)
        return self._step(QUANTIZE, value, [real], [_f32(1.0 / scale), _f32(low), _f32(high)])

    def input(
        self, *, channels: int, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8, rank: int = 4
    ) -> int:
        """Declare the next input, already quantized; its id."""
        self._check_quantization("", scale, zero_point, dtype)
        _check_rank(rank)
        _check_channels(channels)
        value = self._new(_Value(rank, channels, dtype, scale, zero_point, len(self._inputs)))
        self._inputs.append(value)
        return value

    def conv2d(
        self,
        x: int,
        weight: Tensor,
        weight_scale: float | Tensor,
        bias: Tensor | None = None,
        *,
        stride: int | Sequence[int] = 1,
        padding: arguments.Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        output_scale: float | None,
        output_zero_point: int = 0,
        output_dtype: torch.dtype = torch.uint8,
        output_min: float | None = None,
        output_max: float | None = None,
        residual: int | None = None,
    ) -> int:
        """`int8_conv2d` of value `x`; `residual` is a value of the output's shape; no `output_scale`: float32."""
        given = self._quantized("x", x)
        if given.rank != 4:
            raise ValueError("x: expected a (N, C, H, W) value for conv2d; linear takes (N, C)")
        window = _window(
            weight.shape[2:] if weight.dim() == 4 else (0, 0),
            arguments.as_pair("stride", stride, 1),
            arguments.as_sides(padding),
        )
        return self._convolve(
            x, weight, weight_scale, bias, window, arguments.as_pair("dilation", dilation, 1), groups, output_scale,
            output_zero_point, output_dtype, output_min, output_max, residual,
        )  # fmt: skip

    def linear(
        self,
        x: int,
        weight: Tensor,
        weight_scale: float | Tensor,
        bias: Tensor | None = None,
        *,
        output_scale: float | None = None,
        output_zero_point: int = 0,
        output_dtype: torch.dtype = torch.uint8,
        output_min: float | None = None,
        output_max: float | None = None,
        residual: int | None = None,
    ) -> int:
        """`x` (N, K) times int8 `weight` (O, K); without `output_scale` the result is float32."""
        if self._quantized("x", x).rank != 2:
            raise ValueError("x: expected a (N, C) value for linear; flatten makes one")
        if weight.dim() != 2:
            raise ValueError(f"weight: expected (O, K), got {tuple(weight.shape)}")
        return self._convolve(
            x, weight[:, :, None, None], weight_scale, bias, [1, 1, 1, 1, 0, 0, 0, 0], [1, 1], 1, output_scale,
            output_zero_point, output_dtype, output_min, output_max, residual,
        )  # fmt: skip

    def add(
        self,
        a: int,
        b: int,
        *,
        output_scale: float,
        output_zero_point: int = 0,
        output_dtype: torch.dtype = torch.uint8,
        output_min: float | None = None,
        output_max: float | None = None,
    ) -> int:
        """f32(a - za) * f32(sa / s) + f32(b - zb) * f32(sb / s), clamped, rounded; or in integer shifts."""
        left, right = self._quantized("a", a), self._quantized("b", b)
        if (left.rank, left.channels) != (right.rank, right.channels):
            raise ValueError(f"b: expected rank {left.rank} with {left.channels} channels, got {right}")
        self._check_quantization("output_", output_scale, output_zero_point, output_dtype)
        low, high = arithmetic.clamp_range(output_dtype, output_scale, output_zero_point, output_min, output_max)
        fine_a, fine_b, fine = (_exponent(s) for s in (left.scale, right.scale, output_scale))
        finest = max(fine_a, fine_b)
        if self._shift and abs(fine_a - fine_b) > arguments.RESIDUAL_LEFT_MAX:
            raise ValueError(
                f"b: expected a scale within 2^{arguments.RESIDUAL_LEFT_MAX} of a's with requantize='shift'"
            )
        value = _Value(left.rank, left.channels, output_dtype, output_scale, output_zero_point, left.source)
        value.windows, value.flattened = left.windows, left.flattened
        parameters = [_f32(left.scale / output_scale), _f32(right.scale / output_scale), finest - fine_a,
                      finest - fine_b, _clamp_shift(finest - fine), _f32(low), _f32(high)]  # fmt: skip
        return self._step(ADD, value, [a, b], parameters)

    def max_pool2d(
        self,
        x: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: arguments.Padding = 0,
    ) -> int:
        """Maximum over each window; padded taps are left out. The quantization stays."""
        given = self._image("x", x)
        window = _pool_window(kernel_size, stride, padding)
        return self._step(MAX_POOL, self._windowed(given, window), [x], window)

    def avg_pool2d(
        self,
        x: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: arguments.Padding = 0,
        *,
        count_include_pad: bool = True,
        output_scale: float | None = None,
        output_zero_point: int | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> int:
        """Mean over each window, f32(sum(x - z)) * f32(f64(scale / output_scale) / count); default: x's quantization.

        With shifts, the quotient is exact and rounds half up.
        """
        window = _pool_window(kernel_size, stride, padding)
        return self._average(x, window, count_include_pad, output_scale, output_zero_point, output_dtype)

    def global_avg_pool2d(
        self,
        x: int,
        *,
        output_scale: float | None = None,
        output_zero_point: int | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> int:
        """`avg_pool2d` over the whole image: (N, C, 1, 1)."""
        return self._average(x, [0, 0, 1, 1, 0, 0, 0, 0], True, output_scale, output_zero_point, output_dtype)

    def concat(
        self,
        xs: Sequence[int],
        *,
        output_scale: float,
        output_zero_point: int = 0,
        output_dtype: torch.dtype = torch.uint8,
    ) -> int:
        """Along the channels; every input is requantized, f32(x - z) * f32(scale / output_scale)."""
        given = [self._quantized("xs", x) for x in xs]
        if not given or any(v.rank != given[0].rank or v.channels is None for v in given):
            raise ValueError("xs: expected one or more values of one rank and known channels")
        self._check_quantization("output_", output_scale, output_zero_point, output_dtype)
        low, high = arithmetic.clamp_range(output_dtype, output_scale, output_zero_point, None, None)
        value = _Value(
            given[0].rank, sum(v.channels or 0 for v in given), output_dtype, output_scale, output_zero_point,
            given[0].source, given[0].windows,
        )  # fmt: skip
        parameters = [_f32(low), _f32(high)]
        for v in given:
            right = _clamp_shift(_exponent(v.scale) - _exponent(output_scale))
            parameters += [_f32(v.scale / output_scale), right]
        return self._step(CONCAT, value, list(xs), parameters)

    def flatten(self, x: int) -> int:
        """(N, C, H, W) to (N, C*H*W) in the order of torch.flatten(x, 1)."""
        given = self._image("x", x)
        single = given.windows[-6:-5] == (0,)
        value = _Value(2, given.channels if single else None, given.dtype, given.scale, given.zero_point, given.source)
        if not single:
            value.windows, value.flattened = given.windows, given.channels or 0
        return self._step(FLATTEN, value, [x], [])

    def dequantize(self, x: int) -> int:
        """float32 (x - zero_point) * f32(scale)."""
        given = self._quantized("x", x)
        value = _Value(given.rank, given.channels, torch.float32, 1.0, 0, given.source, given.windows, given.flattened)
        return self._step(DEQUANTIZE, value, [x], [_f32(given.scale)])

    def reread(self, x: int, scale: float) -> int:
        """The stored integers of `x` as its reader understands them, at another scale: an id, and no step."""
        given = self._quantized("x", x)
        self._check_quantization("", scale, given.zero_point, given.dtype)
        self._values.append(replace(given, scale=scale))
        return len(self._values) - 1

    def value(self, x: int) -> ValueInfo:
        """What is known of the value `x`."""
        if not 0 <= x < len(self._values):
            raise ValueError(f"x: expected the id of a value of this builder, got {x}")
        found = self._values[x]
        return ValueInfo(found.rank, found.channels, found.dtype, found.scale, found.zero_point)

    def build(self, outputs: list[int]) -> Int8Program:
        """The program that returns the given values."""
        if not outputs or any(not 0 <= v < len(self._values) for v in outputs):
            raise ValueError(f"outputs: expected ids of values, got {outputs}")
        stored = {v.place: v for v in self._values}  # the plan knows no scales: who shares a place is one value
        header = [MAGIC, VERSION, len(self._inputs), len(stored), len(outputs), len(self._steps),
                  int(self._shift), 0]  # fmt: skip
        words = header + [self._values[i].place for i in self._inputs]
        for v in stored.values():
            words += [v.rank, -1 if v.channels is None else v.channels, DTYPES.index(v.dtype), v.zero_point]
        words += [self._values[v].place for v in outputs]
        for step in self._steps:
            words += step
        return Int8Program(
            torch.tensor(words, dtype=torch.int64),
            self._constants.tensor(),
            self._packed.tensor(),
            tuple(w for i in self._inputs for w in self._signature(self._values[i])),
            tuple(w for v in outputs for w in self._recipe(self._values[v])),
        )

    def _convolve(
        self,
        x: int,
        weight: Tensor,
        weight_scale: float | Tensor,
        bias: Tensor | None,
        window: list[int],
        dilation: list[int],
        groups: int,
        output_scale: float | None,
        output_zero_point: int,
        output_dtype: torch.dtype,
        output_min: float | None,
        output_max: float | None,
        residual: int | None,
    ) -> int:
        given = self._quantized("x", x)
        layer = conv.pack_int8_weight(
            weight, weight_scale, bias, input_scale=given.scale, input_zero_point=given.zero_point, groups=groups
        )
        channels = layer.weight.shape[0]
        if given.channels is not None and given.channels != layer.weight.shape[1] * groups:
            raise ValueError(f"weight: expected {given.channels} input channels, got {layer.weight.shape[1] * groups}")
        arguments.check_clamp(output_min, output_max)
        added = None if residual is None else self._quantized("residual", residual)
        if added is not None and (added.rank, added.channels) != (given.rank, channels):
            raise ValueError(f"residual: expected rank {given.rank} with {channels} channels, got {added}")
        residual_scale = None if added is None else added.scale
        if output_scale is None:
            if output_zero_point:
                raise ValueError(f"output_zero_point: expected 0 without output_scale, got {output_zero_point}")
            dtype, scale = torch.float32, 1.0
            low = -_F32_MAX if output_min is None else output_min
            high = _F32_MAX if output_max is None else output_max
        else:
            dtype, scale = output_dtype, output_scale
            self._check_quantization("output_", scale, output_zero_point, dtype)
            low, high = arithmetic.clamp_range(dtype, scale, output_zero_point, output_min, output_max)
        if self._shift:
            conv.check_powers_of_two(layer, output_scale, residual_scale)
        shifted = self._shift and output_scale is not None
        windows = [dilation[0] * (window[0] - 1) + 1, dilation[1] * (window[1] - 1) + 1, *window[2:]]
        value = self._windowed(given, windows) if given.rank == 4 else _Value(2, None, dtype, scale, 0, given.source)
        value.channels, value.dtype, value.scale, value.zero_point = channels, dtype, scale, output_zero_point
        add = self._constants.add
        offset = offsets(layer, given.dtype)
        multiplier = shifts(layer, scale, residual_scale) if shifted else multipliers(layer, scale)
        parameters = [
            channels, layer.weight.shape[1], *window, *dilation, groups, add(layer.weight),
            self._packed.add(layer.packed), add(layer.bias), add(_with_slack(offset)), add(_with_slack(multiplier)),
            _f32(low), _f32(high), _f32(1.0 if residual_scale is None else residual_scale / scale),
        ]  # fmt: skip
        return self._step(CONV, value, [x] if residual is None else [x, residual], parameters)

    def _average(
        self,
        x: int,
        window: list[int],
        count_padding: bool,
        scale: float | None,
        zero_point: int | None,
        dtype: torch.dtype | None,
    ) -> int:
        given = self._image("x", x)
        value = self._windowed(given, window)
        value.scale = given.scale if scale is None else scale
        value.zero_point = given.zero_point if zero_point is None else zero_point
        value.dtype = given.dtype if dtype is None else dtype
        self._check_quantization("output_", value.scale, value.zero_point, value.dtype)
        low, high = arithmetic.clamp_range(value.dtype, value.scale, value.zero_point, None, None)
        right = _exponent(given.scale) - _exponent(value.scale)
        if self._shift and abs(right) > 20:
            raise ValueError(f"output_scale: expected within 2^20 of the input's {given.scale}, got {value.scale}")
        ratio = struct.unpack("<q", struct.pack("<d", given.scale / value.scale))[0]
        return self._step(AVG_POOL, value, [x], [*window, int(count_padding), ratio, right, _f32(low), _f32(high)])

    def _new(self, value: _Value) -> int:
        value.place = self._places
        self._places += 1
        self._values.append(value)
        return len(self._values) - 1

    def _step(self, opcode: int, value: _Value, inputs: list[int], parameters: list[int]) -> int:
        output = self._new(value)
        length = STEP_WORDS + len(inputs) + len(parameters)
        places = [self._values[v].place for v in (output, *inputs)]
        self._steps.append([opcode, length, places[0], len(inputs), *places[1:], *parameters])
        return output

    def _quantized(self, name: str, value: int) -> _Value:
        if not 0 <= value < len(self._values):
            raise ValueError(f"{name}: expected the id of a value of this builder, got {value}")
        if self._values[value].dtype not in conv.INTEGER_RANGE:
            raise ValueError(f"{name}: expected a quantized value, got a float32 one")
        return self._values[value]

    def _image(self, name: str, value: int) -> _Value:
        given = self._quantized(name, value)
        if given.rank != 4:
            raise ValueError(f"{name}: expected a (N, C, H, W) value, got rank {given.rank}")
        return given

    def _windowed(self, given: _Value, window: list[int]) -> _Value:
        """A value of the same quantization, its size mapped by the window."""
        kernel_h, kernel_w, stride_h, stride_w, top, bottom, left, right = window
        windows = (kernel_h, stride_h, top + bottom, kernel_w, stride_w, left + right)
        return _Value(4, given.channels, given.dtype, given.scale, given.zero_point, given.source,
                      given.windows + windows)  # fmt: skip

    def _check_quantization(self, prefix: str, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        if dtype not in conv.INTEGER_RANGE:
            raise TypeError(f"{prefix}dtype: expected torch.uint8 or torch.int8, got {dtype}")
        arguments.check_scale(f"{prefix}scale", scale)
        arguments.check_zero_point(f"{prefix}zero_point", zero_point, *conv.INTEGER_RANGE[dtype])
        if self._shift and math.frexp(scale)[0] != 0.5:
            raise ValueError(f"{prefix}scale: expected a power of two with requantize='shift', got {scale}")

    def _signature(self, value: _Value) -> tuple[int, ...]:
        return (value.rank, value.channels or 0, DTYPES.index(value.dtype))

    def _recipe(self, value: _Value) -> tuple[int, ...]:
        channels = value.flattened if value.channels is None else value.channels
        return (
            value.rank,
            channels,
            DTYPES.index(value.dtype),
            value.source,
            int(value.channels is None),
            len(value.windows) // 6,
            *value.windows,
        )


def offsets(layer: conv.PackedInt8Weight, input_dtype: torch.dtype) -> Tensor:
    """int32 bias - z * ΣW of every channel, z the zero point of the input's bytes as the kernels see them.

    The kernels flip the top bit of int8 input, which adds 128. Wrapping is harmless: the final sum fits.
    """
    zero_point = layer.input_zero_point + (128 if input_dtype == torch.int8 else 0)
    return (layer.bias.long() - zero_point * layer.weight.long().flatten(1).sum(1)).to(torch.int32)


def multipliers(layer: conv.PackedInt8Weight, output_scale: float) -> Tensor:
    """float32 factors from sums to steps of the output."""
    return (layer.input_scale * layer.weight_scale.double() / output_scale).to(torch.float32)


def shifts(layer: conv.PackedInt8Weight, output_scale: float, residual_scale: float | None) -> Tensor:
    """int8 (O, 4): right, sum_left, residual_left, 0; what `Int8Shift` in kernels.h says."""
    fine = 1 - torch.frexp(layer.input_scale * layer.weight_scale.double())[1].long()
    residual_fine = fine if residual_scale is None else torch.full_like(fine, _exponent(residual_scale))
    finest = torch.maximum(fine, residual_fine)
    right = (finest - _exponent(output_scale)).clamp(-31, 62)
    fields = (
        right,
        (finest - fine).clamp(max=arguments.SUM_LEFT_MAX),
        (finest - residual_fine).clamp(max=arguments.RESIDUAL_LEFT_MAX),
        torch.zeros_like(fine),
    )
    return torch.stack(fields, 1).to(torch.int8)


def _with_slack(entries: Tensor) -> Tensor:
    slack = torch.zeros((CHANNEL_SLACK, *entries.shape[1:]), dtype=entries.dtype)
    return torch.cat([entries, slack])


def _window(kernel: Sequence[int], stride: list[int], sides: list[int]) -> list[int]:
    return [*kernel, *stride, *sides]


def _pool_window(
    kernel_size: int | Sequence[int], stride: int | Sequence[int] | None, padding: arguments.Padding
) -> list[int]:
    kernel = arguments.as_pair("kernel_size", kernel_size, 1)
    strides = kernel if stride is None else arguments.as_pair("stride", stride, 1)
    sides = arguments.as_sides(padding)
    if max(sides[:2]) >= kernel[0] or max(sides[2:]) >= kernel[1]:
        raise ValueError(f"padding: expected less than kernel_size={kernel}, got {padding}")
    return _window(kernel, strides, sides)


def _check_rank(rank: int) -> None:
    if rank not in (2, 4):
        raise ValueError(f"rank: expected 2 or 4, got {rank}")


def _check_channels(channels: int) -> None:
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")


def _clamp_shift(right: int) -> int:
    return min(max(right, -31), 62)


def _exponent(scale: float) -> int:
    """p of scale = 2^-p."""
    return 1 - math.frexp(scale)[1]


def _f32(value: float) -> int:
    """Bit pattern of the nearest float32."""
    nearest = float(torch.tensor(value, dtype=torch.float64).to(torch.float32))
    bits: int = struct.unpack("<I", struct.pack("<f", nearest))[0]
    return bits
