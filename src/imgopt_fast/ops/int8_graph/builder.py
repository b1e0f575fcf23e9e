"""Writes a plan of int8_graph step by step, and knows of every value what the plan itself does not: its scale."""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from imgopt_fast import _arguments as arguments
from imgopt_fast.ops import int8_conv2d as conv
from imgopt_fast.ops.int8_conv2d import reference as arithmetic
from imgopt_fast.ops.int8_graph.constants import Blob, exponent, f32, multipliers, offsets, shifts, with_slack
from imgopt_fast.ops.int8_graph.plan import (
    ADD,
    AVG_POOL,
    CONCAT,
    CONV,
    DEQUANTIZE,
    DTYPES,
    FLATTEN,
    MAGIC,
    MAX_POOL,
    QUANTIZE,
    STEP_WORDS,
    VERSION,
    Int8Program,
)
from imgopt_fast.ops.int8_graph.values import (
    Value,
    ValueInfo,
    check_channels,
    check_rank,
    clamp_shift,
    pool_window,
    window_of,
)

# A float output has no zero point and nothing to saturate at: these bounds leave it as it is.
F32_MAX = 3.4028234663852886e38


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
        self._values: list[Value] = []
        self._places = 0
        self._inputs: list[int] = []
        self._steps: list[list[int]] = []
        self._constants = Blob()
        self._packed = Blob()

    def quantize(
        self, *, channels: int, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8, rank: int = 4
    ) -> int:
        """Declare the next input, float32 (N, C, H, W) (or (N, C) with `rank=2`); the id of its quantized form.

        q = round_half_even(clamp(x * f32(1 / scale), lo, hi)) + zero_point; NaN becomes the least value.
        """
        self._check_quantization("", scale, zero_point, dtype)
        check_rank(rank)
        check_channels(channels)
        real = self._new(Value(rank, channels, torch.float32, 1.0, 0, len(self._inputs)))
        self._inputs.append(real)
        low, high = arithmetic.clamp_range(dtype, scale, zero_point, None, None)
        value = Value(rank, channels, dtype, scale, zero_point, self._values[real].source)
        return self._step(QUANTIZE, value, [real], [f32(1.0 / scale), f32(low), f32(high)])

    def input(
        self, *, channels: int, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8, rank: int = 4
    ) -> int:
        """Declare the next input, already quantized; its id."""
        self._check_quantization("", scale, zero_point, dtype)
        check_rank(rank)
        check_channels(channels)
        value = self._new(Value(rank, channels, dtype, scale, zero_point, len(self._inputs)))
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
        window = window_of(
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
        """f32(a - za) * f32(sa / s) + f32(b - zb) * f32(sb / s), clamped, rounded.

        With shifts a - za and b - zb are shifted left to the finer of their scales, added, and requantized as the sum
        of `int8_conv2d` is.
        """
        left, right = self._quantized("a", a), self._quantized("b", b)
        if (left.rank, left.channels) != (right.rank, right.channels):
            raise ValueError(f"b: expected rank {left.rank} with {left.channels} channels, got {right}")
        self._check_quantization("output_", output_scale, output_zero_point, output_dtype)
        low, high = arithmetic.clamp_range(output_dtype, output_scale, output_zero_point, output_min, output_max)
        fine_a, fine_b, fine = (exponent(s) for s in (left.scale, right.scale, output_scale))
        finest = max(fine_a, fine_b)
        if self._shift and abs(fine_a - fine_b) > arguments.RESIDUAL_LEFT_MAX:
            raise ValueError(
                f"b: expected a scale within 2^{arguments.RESIDUAL_LEFT_MAX} of a's with requantize='shift'"
            )
        value = Value(left.rank, left.channels, output_dtype, output_scale, output_zero_point, left.source)
        value.windows, value.flattened = left.windows, left.flattened
        parameters = [f32(left.scale / output_scale), f32(right.scale / output_scale), finest - fine_a,
                      finest - fine_b, clamp_shift(finest - fine), f32(low), f32(high)]  # fmt: skip
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
        window = pool_window(kernel_size, stride, padding)
        return self._step(MAX_POOL, given.windowed(window), [x], window)

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

        With shifts, floor(sum(x - z) * 2^p / count + 1/2) in integers, 2^p = scale / output_scale.
        """
        window = pool_window(kernel_size, stride, padding)
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
        """Along the channels; every input is requantized, f32(x - z) * f32(scale / output_scale), or by a shift."""
        given = [self._quantized("xs", x) for x in xs]
        if not given or any(v.rank != given[0].rank or v.channels is None for v in given):
            raise ValueError("xs: expected one or more values of one rank and known channels")
        self._check_quantization("output_", output_scale, output_zero_point, output_dtype)
        low, high = arithmetic.clamp_range(output_dtype, output_scale, output_zero_point, None, None)
        value = Value(
            given[0].rank, sum(v.channels or 0 for v in given), output_dtype, output_scale, output_zero_point,
            given[0].source, given[0].windows,
        )  # fmt: skip
        parameters = [f32(low), f32(high)]
        for v in given:
            right = clamp_shift(exponent(v.scale) - exponent(output_scale))
            parameters += [f32(v.scale / output_scale), right]
        return self._step(CONCAT, value, list(xs), parameters)

    def flatten(self, x: int) -> int:
        """(N, C, H, W) to (N, C*H*W) in the order of torch.flatten(x, 1)."""
        given = self._image("x", x)
        single = given.windows[-6:-5] == (0,)
        value = Value(2, given.channels if single else None, given.dtype, given.scale, given.zero_point, given.source)
        if not single:
            value.windows, value.flattened = given.windows, given.channels or 0
        return self._step(FLATTEN, value, [x], [])

    def dequantize(self, x: int) -> int:
        """float32 (x - zero_point) * f32(scale)."""
        given = self._quantized("x", x)
        value = Value(given.rank, given.channels, torch.float32, 1.0, 0, given.source, given.windows, given.flattened)
        return self._step(DEQUANTIZE, value, [x], [f32(given.scale)])

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
            tuple(w for i in self._inputs for w in self._values[i].signature()),
            tuple(w for v in outputs for w in self._values[v].recipe()),
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
            low = -F32_MAX if output_min is None else output_min
            high = F32_MAX if output_max is None else output_max
        else:
            dtype, scale = output_dtype, output_scale
            self._check_quantization("output_", scale, output_zero_point, dtype)
            low, high = arithmetic.clamp_range(dtype, scale, output_zero_point, output_min, output_max)
        if self._shift:
            conv.check_powers_of_two(layer, output_scale, residual_scale)
        shifted = self._shift and output_scale is not None
        windows = [dilation[0] * (window[0] - 1) + 1, dilation[1] * (window[1] - 1) + 1, *window[2:]]
        value = given.windowed(windows) if given.rank == 4 else Value(2, None, dtype, scale, 0, given.source)
        value.channels, value.dtype, value.scale, value.zero_point = channels, dtype, scale, output_zero_point
        add = self._constants.add
        offset = offsets(layer, given.dtype)
        multiplier = shifts(layer, scale, residual_scale) if shifted else multipliers(layer, scale)
        parameters = [
            channels, layer.weight.shape[1], *window, *dilation, groups, add(layer.weight),
            self._packed.add(layer.packed), add(layer.bias), add(with_slack(offset)), add(with_slack(multiplier)),
            f32(low), f32(high), f32(1.0 if residual_scale is None else residual_scale / scale),
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
        value = given.windowed(window)
        value.scale = given.scale if scale is None else scale
        value.zero_point = given.zero_point if zero_point is None else zero_point
        value.dtype = given.dtype if dtype is None else dtype
        self._check_quantization("output_", value.scale, value.zero_point, value.dtype)
        low, high = arithmetic.clamp_range(value.dtype, value.scale, value.zero_point, None, None)
        right = exponent(given.scale) - exponent(value.scale)
        if self._shift and abs(right) > 20:
            raise ValueError(f"output_scale: expected within 2^20 of the input's {given.scale}, got {value.scale}")
        ratio = struct.unpack("<q", struct.pack("<d", given.scale / value.scale))[0]
        return self._step(AVG_POOL, value, [x], [*window, int(count_padding), ratio, right, f32(low), f32(high)])

    def _new(self, value: Value) -> int:
        value.place, value.zero_point = self._places, int(value.zero_point)
        self._places += 1
        self._values.append(value)
        return len(self._values) - 1

    def _step(self, opcode: int, value: Value, inputs: list[int], parameters: list[int]) -> int:
        output = self._new(value)
        length = STEP_WORDS + len(inputs) + len(parameters)
        places = [self._values[v].place for v in (output, *inputs)]
        self._steps.append([opcode, length, places[0], len(inputs), *places[1:], *parameters])
        return output

    def _quantized(self, name: str, value: int) -> Value:
        if not 0 <= value < len(self._values):
            raise ValueError(f"{name}: expected the id of a value of this builder, got {value}")
        if self._values[value].dtype not in conv.INTEGER_RANGE:
            raise ValueError(f"{name}: expected a quantized value, got a float32 one")
        return self._values[value]

    def _image(self, name: str, value: int) -> Value:
        given = self._quantized(name, value)
        if given.rank != 4:
            raise ValueError(f"{name}: expected a (N, C, H, W) value, got rank {given.rank}")
        return given

    def _check_quantization(self, prefix: str, scale: float, zero_point: int, dtype: torch.dtype) -> None:
        if dtype not in conv.INTEGER_RANGE:
            raise TypeError(f"{prefix}dtype: expected torch.uint8 or torch.int8, got {dtype}")
        arguments.check_scale(f"{prefix}scale", scale)
        arguments.check_zero_point(f"{prefix}zero_point", zero_point, *conv.INTEGER_RANGE[dtype])
        if self._shift and math.frexp(scale)[0] != 0.5:
            raise ValueError(f"{prefix}scale: expected a power of two with requantize='shift', got {scale}")
