"""The three operations as JAX functions, for TPUs and whatever else XLA compiles to.

Plain `jnp` and `lax`, so `jit`, `vmap`, `grad` and `jax.export` work through them. `int8_conv2d` has the bits of
`imgopt_fast.int8_conv2d`: its sums are exact in int32, and the rest is the same float32 operations in the same order,
each product kept from fusing with the sum behind it. `affine_warp` and `masked_matmul` compute in float32 and stay
within the bounds of their docstrings. Arguments have the names and meanings of the torch functions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from imgopt_fast._arguments import (
    Padding,
    as_pair,
    as_sides,
    check_clamp,
    check_scale,
    check_shift_scales,
    check_zero_point,
    normalization,
    one_of,
    per_channel,
)

__all__ = ["affine_warp", "int8_conv2d", "masked_matmul"]

A = -0.75  # Keys' parameter of the bicubic kernel, as in torch and OpenCV
COORDINATE_MAX = 2.0**30  # beyond it every pixel is outside, and indices stay in int32
RANGES = {"uint8": (0, 255), "int8": (-128, 127)}


# --- int8_conv2d ------------------------------------------------------------------------------------------------------


def int8_conv2d(
    input: Array,
    weight: Any,
    bias: Any = None,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    weight_scale: Any,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: Any = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_min: float | None = None,
    output_max: float | None = None,
    residual: Array | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int = 0,
    requantize: Literal["float", "shift"] = "float",
) -> Array:
    """Quantized convolution (N, C, H, W) -> (N, O, OH, OW), bit-equal to `imgopt_fast.int8_conv2d`.

    `weight` int8 (O, C/groups, kH, kW), `weight_scale` and `bias` are constants (NumPy arrays or numbers, not traced);
    a `bias` of int32 is taken as steps of input_scale * weight_scale[o]. Sums must fit into int32, which `requantize=
    "shift"` needs of the shifted ones, too. Raises ValueError and TypeError that name the argument.
    """
    if input.ndim != 4 or str(input.dtype) not in RANGES:
        raise TypeError(f"input: expected uint8 or int8 (N, C, H, W), got {input.dtype} of {input.shape}")
    weight = np.asarray(weight)
    if weight.dtype != np.int8 or weight.ndim != 4:
        raise TypeError(f"weight: expected int8 (O, C/groups, kH, kW), got {weight.dtype} of {weight.shape}")
    if weight.shape[1] * groups != input.shape[1]:
        raise ValueError(f"input: expected {weight.shape[1] * groups} channels, got {input.shape[1]}")
    one_of("requantize", requantize, ("float", "shift"))
    check_scale("input_scale", input_scale)
    input_zero_point = check_zero_point("input_zero_point", input_zero_point, *RANGES[str(input.dtype)])
    check_clamp(output_min, output_max)
    scales = np.broadcast_to(np.asarray(weight_scale, np.float32), len(weight)).astype(np.float64)
    sums = _exact_sums(input, weight, input_zero_point, stride, padding, dilation, groups)
    sums = sums + _bias_steps(bias, input_scale * scales).reshape(1, -1, 1, 1)
    if output_scale is None:
        real = sums.astype(jnp.float32) * _float32(input_scale * scales).reshape(1, -1, 1, 1)
        if residual is not None:
            real = _apart(real) + _difference(residual, residual_zero_point) * _float32(residual_scale)
        return jnp.clip(real, output_min, output_max)
    dtype = str(jnp.dtype(output_dtype or input.dtype))
    if dtype not in RANGES:
        raise TypeError(f"output_dtype: expected uint8 or int8, got {dtype}")
    check_scale("output_scale", output_scale)
    output_zero_point = check_zero_point("output_zero_point", output_zero_point, *RANGES[dtype])
    low, high = _range(dtype, output_scale, output_zero_point, output_min, output_max)
    if requantize == "shift":
        check_shift_scales(input_scale=input_scale, output_scale=output_scale, residual_scale=residual_scale)
        steps = _shift(sums, input_scale * scales, residual, residual_scale, residual_zero_point, output_scale)
        steps = jnp.clip(steps, round(low), round(high))
    else:
        y = sums.astype(jnp.float32) * _float32(input_scale * scales / output_scale).reshape(1, -1, 1, 1)
        if residual is not None:
            assert residual_scale is not None
            ratio = _float32(residual_scale / output_scale)
            y = _apart(y) + _apart(_difference(residual, residual_zero_point) * ratio)
        steps = jnp.round(jnp.clip(y, low, high)).astype(jnp.int32)
    return (steps + output_zero_point).astype(dtype)


def _exact_sums(
    x: Array, weight: Any, zero_point: int, stride: Any, padding: Padding, dilation: Any, groups: int
) -> Array:
    """int32 sums. A padded tap is real zero, so that the zero point is taken off before padding."""
    top, bottom, left, right = as_sides(padding)
    return lax.conv_general_dilated(
        x.astype(jnp.int32) - zero_point,
        jnp.asarray(weight.astype(np.int32)),
        as_pair("stride", stride, 1),
        [(top, bottom), (left, right)],
        rhs_dilation=as_pair("dilation", dilation, 1),
        feature_group_count=groups,
        preferred_element_type=jnp.int32,
    )


def _bias_steps(bias: Any, scale: np.ndarray[Any, Any]) -> Any:
    if bias is None:
        return np.zeros(len(scale), np.int32)
    bias = np.asarray(bias)
    if bias.dtype == np.int32:
        return bias
    return np.rint(bias.astype(np.float64) / scale).astype(np.int32)


def _shift(
    sums: Array, scale: np.ndarray[Any, Any], residual: Array | None, residual_scale: float | None, zero: int,
    output_scale: float,
) -> Array:  # fmt: skip
    """`(t + (1 << (s - 1))) >> s` with t the sum and the residual at the finer of their scales, all in int32.

    The rounding is written (t >> s) + ((t >> (s - 1)) & 1), which cannot overflow. Bits of the sum that are finer than
    the residual's last one in int32 are dropped first: a rounding shift that is longer loses them anyway.
    """
    fine = 1 - np.frexp(scale)[1].astype(np.int64)
    output = 1 - np.frexp(output_scale)[1]
    if residual is not None:
        assert residual_scale is not None
        coarse = 1 - np.frexp(residual_scale)[1]
        finest = np.maximum(fine, coarse)
        drop = np.maximum(finest - coarse - 22, 0)
        sums = jnp.left_shift(sums >> _channels(drop), _channels(finest - fine))
        sums = sums + jnp.left_shift(residual.astype(jnp.int32) - zero, _channels(finest - coarse - drop))
        fine = finest - drop
    right = fine - output
    down, up = np.clip(right, 1, 31), np.clip(-right, 0, 20)
    lowered = (sums >> _channels(down)) + ((sums >> _channels(down - 1)) & 1)
    lowered = jnp.where(_channels(right) > 31, 0, lowered)
    raised = jnp.left_shift(jnp.clip(sums, -512, 512), _channels(up))  # what is larger saturates anyway
    return jnp.where(_channels(right) > 0, lowered, raised)


def _channels(values: Any) -> Any:
    return np.asarray(values, np.int32).reshape(1, -1, 1, 1)


def _range(
    dtype: str, scale: float, zero_point: int, output_min: float | None, output_max: float | None
) -> tuple[float, float]:
    low, high = (float(limit - zero_point) for limit in RANGES[dtype])
    if output_min is not None:
        low = min(max(low, float(np.float32(output_min / scale))), high)
    if output_max is not None:
        high = max(min(high, float(np.float32(output_max / scale))), low)
    return low, high


def _difference(stored: Array, zero_point: int) -> Array:
    return (stored.astype(jnp.int32) - zero_point).astype(jnp.float32)


def _float32(values: Any) -> Any:
    return np.asarray(values, np.float64).astype(np.float32)


def _apart(product: Array) -> Array:
    """`product`, rounded to float32 before anything is added: XLA may otherwise fuse the two into one rounding."""
    return lax.reduce_precision(product, exponent_bits=8, mantissa_bits=23)


# --- masked_matmul ----------------------------------------------------------------------------------------------------


def masked_matmul(input: Array, weight: Array, mask: Any = None, bias: Array | None = None) -> Array:
    """`input @ where(mask, weight, 0).T + bias`: input (..., K), weight and mask (O, K), bias (O,).

    XLA has no sparse product of this kind: the masked weights are zeros in a dense one. Sums are in float32 at the
    highest precision the device has; against `imgopt_fast.masked_matmul` in float32 the difference is at most
    K * 2^-23 times the sum of the products' magnitudes. Gradients are those of the torch function: zero off the mask.
    """
    if weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected (..., K) and weight (O, K), got {input.shape} and {weight.shape}")
    if mask is not None:
        if mask.shape != weight.shape or mask.dtype != bool:
            raise ValueError(f"mask: expected bool of {weight.shape}, got {mask.dtype} of {mask.shape}")
        weight = jnp.where(mask, weight, jnp.zeros((), weight.dtype))
    wide = jnp.promote_types(input.dtype, jnp.float32)
    result = lax.dot_general(
        input, weight, (((input.ndim - 1,), (1,)), ((), ())), precision="highest", preferred_element_type=wide
    )
    return (result if bias is None else result + bias).astype(input.dtype)


# --- affine_warp ------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("size", "interpolation", "padding_mode", "fill", "mean", "std", "dtype"))
def _warp(
    images: Array, matrix: Array, table: Array | None, color_matrix: Array | None, *, size: tuple[int, int],
    interpolation: str, padding_mode: str, fill: tuple[float, ...], mean: tuple[float, ...], std: tuple[float, ...],
    dtype: str,
) -> Array:  # fmt: skip
    n, channels = images.shape[:2]
    levels = images.dtype == jnp.uint8
    if table is not None:
        rows = jnp.broadcast_to(table, (n, channels, 256))
        images = jnp.take_along_axis(rows, images.reshape(n, channels, -1).astype(jnp.int32), 2).reshape(images.shape)
    source = images.astype(jnp.promote_types(jnp.float32, images.dtype) if not levels else jnp.float32)
    x, y = _coordinates(jnp.broadcast_to(matrix, (n, *matrix.shape[1:])).astype(source.dtype), size)
    values = jax.vmap(partial(_sample, interpolation=interpolation, padding_mode=padding_mode, fill=fill))(source, x, y)
    unit = not levels
    if color_matrix is not None:
        values = values if unit else values / 255
        color = jnp.broadcast_to(color_matrix, (n, 3, 4)).astype(values.dtype)
        values = jnp.einsum("nij,njhw->nihw", color[:, :, :3], values, precision="highest")
        values, unit = jnp.clip(values + color[:, :, 3, None, None], 0, 1), True
    if dtype == "uint8":
        return jnp.clip(jnp.round(jnp.nan_to_num(values * 255 if unit else values)), 0, 255).astype(jnp.uint8)
    values = values if unit else values / 255
    if std:
        shape = (1, channels, 1, 1)
        values = (values - np.reshape(mean, shape)) / np.reshape(std, shape)
    return values.astype(dtype)


def affine_warp(
    images: Array,
    matrix: Array,
    *,
    size: tuple[int, int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    table: Array | None = None,
    color_matrix: Array | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: Any = None,
) -> Array:
    """`imgopt_fast.affine_warp` of images (N, C, H, W) by matrices (N or 1, 2 or 3, 3), without antialias.

    Coordinates are float32, so that a value may be off by what a shift of 2^-23 times the largest coordinate changes;
    uint8 results differ by one level at most, on fewer than 1 % of the pixels of natural images. Differentiable in
    floating `images`, in `matrix` and in `color_matrix`.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected (N, C, H, W), got {images.shape}")
    if matrix.ndim != 3 or matrix.shape[1:] not in ((2, 3), (3, 3)) or matrix.shape[0] not in (1, len(images)):
        raise ValueError(f"matrix: expected (N, 2, 3) or (N, 3, 3) with N = {len(images)} or 1, got {matrix.shape}")
    channels = images.shape[1]
    mean_list, std_list = normalization(mean, std, channels)
    target = str(jnp.dtype(dtype or images.dtype))
    if target == "uint8" and std_list:
        raise ValueError("mean, std: expected a floating output, got dtype uint8")
    fills = per_channel("fill", fill, channels)
    if images.dtype == jnp.uint8:
        fills = [float(round(value)) for value in fills]
    result: Array = _warp(
        images,
        matrix,
        table,
        color_matrix,
        size=tuple(size) if size is not None else images.shape[2:],
        interpolation=one_of("interpolation", interpolation, ("nearest", "bilinear", "bicubic")),
        padding_mode=one_of("padding_mode", padding_mode, ("constant", "edge", "reflect", "symmetric")),
        fill=tuple(fills),
        mean=tuple(mean_list),
        std=tuple(std_list),
        dtype=target,
    )
    return result


def _coordinates(matrix: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """Source x and y, each (N, H, W), of every output pixel."""
    x = jnp.arange(size[1], dtype=matrix.dtype)
    y = jnp.arange(size[0], dtype=matrix.dtype)[:, None]
    m = matrix[:, :, :, None, None]
    rows = [m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(matrix.shape[1])]
    if len(rows) == 2:
        return rows[0], rows[1]
    infinite = rows[2] == 0
    w = jnp.where(infinite, 1.0, rows[2])  # so that no gradient becomes 0 · inf
    return jnp.where(infinite, jnp.inf, rows[0] / w), jnp.where(infinite, jnp.inf, rows[1] / w)


def _sample(
    image: Array, x: Array, y: Array, *, interpolation: str, padding_mode: str, fill: tuple[float, ...]
) -> Array:
    """One image (C, H, W) at the points (x, y)."""
    finite = jnp.isfinite(x) & jnp.isfinite(y)
    x, y = (jnp.clip(jnp.where(finite, t, 0.0), -COORDINATE_MAX, COORDINATE_MAX) for t in (x, y))
    outside = np.reshape(np.asarray(fill, image.dtype), (-1, 1, 1))
    height, width = image.shape[1:]
    total = jnp.zeros((image.shape[0], *x.shape), image.dtype)
    for iy, wy in _taps(y, interpolation):
        fy, inside_y = _folded(iy, height, padding_mode)
        for ix, wx in _taps(x, interpolation):
            fx, inside_x = _folded(ix, width, padding_mode)
            total = total + wy * wx * jnp.where(inside_y & inside_x, image[:, fy, fx], outside)
    return jnp.where(finite, total, outside)


def _taps(t: Array, interpolation: str) -> list[tuple[Array, Array]]:
    """Index and weight of each pixel that the point `t` reads along one axis."""
    if interpolation == "nearest":
        return [(jnp.floor(t + 0.5).astype(jnp.int32), jnp.ones_like(t))]
    base = lax.stop_gradient(jnp.floor(t))
    f, i = t - base, base.astype(jnp.int32)
    if interpolation == "bilinear":
        return [(i, 1 - f), (i + 1, f)]

    def near(d: Array) -> Array:  # distance 0..1
        return ((A + 2) * d - (A + 3)) * d * d + 1

    def far(d: Array) -> Array:  # distance 1..2
        return ((A * d - 5 * A) * d + 8 * A) * d - 4 * A

    return [(i - 1, far(1 + f)), (i, near(f)), (i + 1, near(1 - f)), (i + 2, far(2 - f))]


def _folded(i: Array, n: int, padding_mode: str) -> tuple[Array, Array]:
    """Index inside [0, n), and whether the pixel is one of the image (only "constant" has others)."""
    if padding_mode == "constant":
        return jnp.clip(i, 0, n - 1), (i >= 0) & (i < n)
    inside = jnp.ones_like(i, bool)
    if padding_mode == "edge" or n == 1:
        return jnp.clip(i, 0, n - 1), inside
    if padding_mode == "reflect":
        i = jnp.remainder(i, 2 * n - 2)
        return jnp.minimum(i, 2 * n - 2 - i), inside
    i = jnp.remainder(i, 2 * n)
    return jnp.minimum(i, 2 * n - 1 - i), inside
