"""int8_conv2d in plain torch, on any device: the definition that every kernel is compared with bit by bit.

The sums are a float64 convolution of integers, which is exact: no partial sum of admitted weights reaches 2^53, in
whatever order it is formed. The rest follows the formulas of the public function word by word.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

INTEGER_RANGE = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_scale: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_min: float | None,
    output_max: float | None,
    residual_scale: float,
    residual_zero_point: int,
    shift: bool,
) -> Tensor:
    """Implements the schema of `int8_conv2d`; `packed` is not looked at."""
    sums = convolve(input, weight, bias, input_zero_point, stride, padding, dilation, groups)
    return requantize(
        sums, input_scale * weight_scale.double(), residual, output_scale, output_zero_point, output_dtype, output_min,
        output_max, residual_scale, residual_zero_point, shift,
    )  # fmt: skip


def requantize(
    sums: Tensor,
    sum_scale: Tensor,
    residual: Tensor | None,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype,
    output_min: float | None,
    output_max: float | None,
    residual_scale: float,
    residual_zero_point: int,
    shift: bool,
) -> Tensor:
    """The output from exact sums of scale `sum_scale` (float64, (O,)), in channels_last memory."""
    scale = sum_scale.view(1, -1, 1, 1)
    difference = None if residual is None else residual.to(torch.int32) - residual_zero_point
    if output_scale is None:
        y = add_scaled(sums.to(torch.float32) * scale.to(torch.float32), difference, residual_scale)
        return _channels_last(clamp_real(y, output_min, output_max), torch.float32)
    low, high = clamp_range(output_dtype, output_scale, output_zero_point, output_min, output_max)
    if shift:
        steps = shift_requantize(sums.to(torch.int64), scale, difference, residual_scale, output_scale)
        steps = steps.clamp(round(low), round(high))
    else:
        y = sums.to(torch.float32) * (scale / output_scale).to(torch.float32)
        y = add_scaled(y, difference, residual_scale / output_scale)
        steps = torch.round(y.clamp(low, high))
    return _channels_last(steps + output_zero_point, output_dtype)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The exact sums with bias, as float64; a padded tap is real zero."""
    top, bottom, left, right = padding
    x = F.pad(input.double() - zero_point, (left, right, top, bottom))
    # cuDNN could choose a transformed algorithm, which would not be exact.
    plain = torch.backends.cudnn.flags(enabled=False) if input.is_cuda else contextlib.nullcontext()
    with plain:
        sums = F.conv2d(x, weight.double(), None, stride, 0, dilation, groups)
    return sums + bias.double().view(1, -1, 1, 1)


def clamp_range(
    dtype: torch.dtype, scale: float, zero_point: int, output_min: float | None, output_max: float | None
) -> tuple[float, float]:
    """What y may be before the zero point is added: the dtype's range, narrowed by the real bounds, as float32."""
    low, high = (float(limit - int(zero_point)) for limit in INTEGER_RANGE[dtype])
    if output_min is not None:
        low = min(max(low, _f32(output_min / scale)), high)
    if output_max is not None:
        high = max(min(high, _f32(output_max / scale)), low)
    return low, high


def clamp_real(y: Tensor, output_min: float | None, output_max: float | None) -> Tensor:
    """Clamp float32 values in real units."""
    if output_min is not None:
        y = y.clamp(min=_f32(output_min))
    if output_max is not None:
        y = y.clamp(max=_f32(output_max))
    return y


def add_scaled(y: Tensor, difference: Tensor | None, scale: float) -> Tensor:
    """`y` plus a residual: a float32 product and a float32 sum, never fused."""
    if difference is None:
        return y
    return y + difference.to(torch.float32) * _f32(scale)


def shift_requantize(
    sums: Tensor, scale: Tensor, difference: Tensor | None, residual_scale: float, output_scale: float
) -> Tensor:
    """int64 sums at power-of-two `scale` to steps of `output_scale`, not yet saturated."""
    fine = _exponent(scale)
    if difference is not None:
        residual_fine = _exponent(torch.tensor(residual_scale, dtype=torch.float64, device=sums.device))
        finest = torch.maximum(fine, residual_fine)
        # The bounds are checked by the public function; a compiled graph that skipped the check must not overflow.
        sums = (sums << (finest - fine).clamp(max=29)) + (difference.long() << (finest - residual_fine).clamp(max=51))
        fine = finest
    return shift_right(sums, fine - _exponent(torch.tensor(output_scale, dtype=torch.float64, device=sums.device)))


def shift_right(sums: Tensor, right: Tensor) -> Tensor:
    """sums * 2^-right, rounding half up; a negative `right` shifts left.

    Beyond 62 the result is 0, as it is at 62, for every |sum| < 2^61; a left shift past 31 saturates as at 31.
    """
    down = right.clamp(1, 62)
    shifted_down = (sums + (torch.ones_like(down) << (down - 1))) >> down
    shifted_up = sums.clamp(-(2**31), 2**31) << (-right).clamp(0, 31)
    return torch.where(right > 0, shifted_down, shifted_up)


def _exponent(scale: Tensor) -> Tensor:
    """p of scale = 2^-p."""
    return 1 - torch.frexp(scale)[1].to(torch.int64)


def _f32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32))


def _channels_last(values: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(values.shape, dtype=dtype, device=values.device, memory_format=torch.channels_last)
    return out.copy_(values)
