"""Checks of plain arguments that the torch and the NumPy face of an operation share; needs neither of them.

Every error names the argument, says what was expected and what came.
"""

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from typing import Any


def described(value: Any, array: type[Any]) -> str:
    """What came where an `array` was expected: its dtype and shape if it is one, its type if it is not."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, array) else type(value).__name__


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """`value`, which has to be one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def per_channel(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    """`value` as a list of `channels` floats; a single number serves all channels."""
    if isinstance(value, Real) and not isinstance(value, bool):
        return [float(value)] * channels
    try:
        values = [float(v) for v in value]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a sequence of numbers, got {value!r}") from None
    if len(values) != channels:
        raise ValueError(f"{name}: expected one number or {channels}, one per channel, got {len(values)}")
    return values


# --- affine_warp ------------------------------------------------------------------------------------------------------

MAX_SIDE = (1 << 30) - 1  # coordinates are int32, and reflection needs twice the side


def uint8_fill(fill: list[float]) -> list[float]:
    """Fill of a uint8 image: rounded half to even, as it becomes a pixel."""
    for value in fill:
        if not 0 <= value <= 255:
            raise ValueError(f"fill: expected values in 0..255 for uint8 images, got {value}")
    return [float(round(value)) for value in fill]


def normalization(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """`mean` and `std` per channel; two empty lists where neither is given, 0 and 1 for one that is missing."""
    if mean is None and std is None:
        return [], []
    means = per_channel("mean", 0.0 if mean is None else mean, channels)
    stds = per_channel("std", 1.0 if std is None else std, channels)
    for value in means:
        if not math.isfinite(value):
            raise ValueError(f"mean: expected finite values, got {value}")
    for value in stds:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"std: expected positive finite values, got {value}")
    return means, stds


def warp_size(
    size: Sequence[int] | None, height: int, width: int, integer: type | tuple[type, ...]
) -> tuple[int, int]:  # fmt: skip
    """(height, width) of the output, `size` or else those of the images, all of them of type `integer`."""
    try:
        out_height, out_width = (height, width) if size is None else size
    except (TypeError, ValueError):
        raise ValueError(f"size: expected (height, width), got {size!r}") from None
    for name, side, least in (
        ("images", height, 1), ("images", width, 1), ("size", out_height, 0), ("size", out_width, 0),
    ):  # fmt: skip
        if not isinstance(side, integer) or not least <= side <= MAX_SIDE:
            raise ValueError(f"{name}: expected sides between {least} and {MAX_SIDE}, got {side!r}")
    return out_height, out_width


# --- int8_conv2d ------------------------------------------------------------------------------------------------------

Padding = int | Sequence[int] | Sequence[Sequence[int]]
# Scales outside of this range are refused: inside of it no multiplier input_scale·weight_scale/output_scale is
# subnormal (2^-120 ≥ 2^-126), and no product with an int32 sum overflows float32 (2^(24+24+48+31) < 2^128).
SCALE_MIN, SCALE_MAX = 2.0**-48, 2.0**24
# requantize="shift": how far the sum (below 2^31) and the residual (below 2^9) may move left to meet each other's
# scale; together they then stay below 2^61, and adding the rounding half stays within int64.
SUM_LEFT_MAX, RESIDUAL_LEFT_MAX = 29, 51


def check_scale(name: str, scale: float) -> None:
    """ValueError unless `scale` can be the scale of a quantized tensor."""
    try:
        fits = SCALE_MIN <= scale <= SCALE_MAX
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{name}: expected a positive finite number in [2^-48, 2^24], got {scale!r}")


def check_packed_alone(
    bias: object, input_scale: object, input_zero_point: int, weight_scale: object, groups: int
) -> None:
    """ValueError for an argument of `int8_conv2d` that a packed weight brings along."""
    if bias is not None or input_scale is not None or weight_scale is not None or groups != 1 or input_zero_point:
        raise ValueError(
            "weight: is packed, so bias, input_scale, input_zero_point, weight_scale and groups come from it; "
            "leave them out"
        )


def check_zero_point(name: str, zero_point: int, low: int, high: int) -> int:
    """`zero_point`, which has to be an integer in [low, high]; NumPy's small ones become Python's, which never wrap."""
    if isinstance(zero_point, Integral) and low <= int(zero_point) <= high:
        return int(zero_point)
    raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {zero_point!r}")


def check_shift_scales(**scales: float | None) -> None:
    """ValueError unless every scale that is given is a power of two."""
    for name, scale in scales.items():
        if scale is not None and math.frexp(scale)[0] != 0.5:
            raise ValueError(f"{name}: expected a power of two with requantize='shift', got {scale}")


def check_shift_span(input_scale: float, least: int, most: int, residual_scale: float | None) -> None:
    """ValueError unless sum and residual fit one scale; `least`..`most` are the weight scales' frexp exponents."""
    if residual_scale is None:
        return
    base = math.frexp(input_scale)[1] - 1 - math.frexp(residual_scale)[1]  # log2 of input_scale / residual_scale / 2
    if base + most > SUM_LEFT_MAX or base + least < -RESIDUAL_LEFT_MAX:
        raise ValueError(
            f"residual_scale: expected between 2^-{SUM_LEFT_MAX} and 2^{RESIDUAL_LEFT_MAX} times "
            f"input_scale*weight_scale with requantize='shift', got 2^{-(base + most)} to 2^{-(base + least)} times"
        )


def check_clamp(output_min: float | None, output_max: float | None) -> None:
    """ValueError unless the bounds, where there are any, are ordered numbers."""
    for name, value in (("output_min", output_min), ("output_max", output_max)):
        if value is not None and not (isinstance(value, Real) and value == value):
            raise ValueError(f"{name}: expected a number, got {value!r}")
    if output_min is not None and output_max is not None and output_min > output_max:
        raise ValueError(f"output_min: expected at most output_max={output_max}, got {output_min}")


def as_pair(name: str, value: int | Sequence[int], low: int) -> list[int]:
    """`value` as [h, w]; a single integer serves both."""
    pair = _integers([value, value] if isinstance(value, Integral) else value)
    if len(pair) == 2 and min(pair) >= low:
        return pair
    raise ValueError(f"{name}: expected an integer of at least {low} or a pair of them, got {value!r}")


def as_sides(padding: Padding) -> list[int]:
    """[top, bottom, left, right]."""
    try:
        axes = [padding, padding] if isinstance(padding, Integral) else list(padding)  # type: ignore[arg-type]
    except TypeError:
        axes = []
    pairs = [_integers([axis, axis] if isinstance(axis, Integral) else axis) for axis in axes]
    if [len(pair) for pair in pairs] == [2, 2] and min(map(min, pairs)) >= 0:
        return [*pairs[0], *pairs[1]]
    raise ValueError(
        f"padding: expected an integer, (h, w) or ((top, bottom), (left, right)), none negative, got {padding!r}"
    )


def _integers(values: object) -> list[int]:
    """`values` as a list; empty where it is no sequence of integers."""
    given = list(values) if isinstance(values, Sequence) else []
    return [int(value) for value in given] if all(isinstance(value, Integral) for value in given) else []


def output_size(
    input: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Shape of the output; ValueError where the window does not fit into the padded input."""
    size = [input[0], weight[0]]
    for axis in (0, 1):
        padded = input[2 + axis] + padding[2 * axis] + padding[2 * axis + 1]
        window = dilation[axis] * (weight[2 + axis] - 1) + 1
        if padded < window:
            raise ValueError(
                f"input: expected at least {window} {('rows', 'columns')[axis]} with padding for the dilated kernel, "
                f"got {padded}"
            )
        size.append((padded - window) // stride[axis] + 1)
    return size
