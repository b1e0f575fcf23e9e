"""The three operations on NumPy arrays, images as (N, H, W, C) or (H, W, C), without torch where the kernels are there.

What torch's dispatcher does for tensors, pybind11's `_core` does here; the GIL is released while a kernel runs.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from imgopt_fast import _native
from imgopt_fast._arguments import (
    SCALE_MAX,
    SCALE_MIN,
    Padding,
    as_pair,
    as_sides,
    check_clamp,
    check_packed_alone,
    check_scale,
    check_shift_scales,
    check_shift_span,
    check_zero_point,
    normalization,
    one_of,
    output_size,
    per_channel,
    uint8_fill,
)
from imgopt_fast._mask_blocks import block_columns
from imgopt_fast._prepared import PreparedCalls

_native.backend()  # a wrong IMGOPT_ISA or IMGOPT_BACKEND is an error at import, not in the first call

# --- affine_warp ---------------------------------------------------------------------------------------------------

_PIXELS = ("uint8", "float16", "float32", "float64")


def affine_warp(
    images: NDArray[Any],
    matrix: NDArray[Any],
    *,
    size: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    antialias: bool = False,
    table: NDArray[np.uint8] | None = None,
    color_matrix: NDArray[Any] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: Any = None,
    channels_first: bool = False,
) -> NDArray[Any]:
    """`imgopt_fast.affine_warp` for arrays: the same arguments and results, with channels last.

    Args:
        images: (N, H, W, C) or (H, W, C), uint8, float16, float32 or float64; any strides.
        matrix: (N or 1, 2 or 3, 3), or (2 or 3, 3) for all images; floating, finite. Output to input, x before y,
            pixel centres at integers.
        size, interpolation, padding_mode, fill, antialias, mean, std: as in `imgopt_fast.affine_warp`.
        table: (N or 1, C, 256) or (C, 256) uint8.
        color_matrix: (N or 1, 3, 4) or (3, 4), floating, finite.
        dtype: of the output; the input's by default.
        channels_first: return (N, C, H, W) or (C, H, W), as networks take it.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value; the text names it.
    """
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images: expected a NumPy array, got {type(images).__name__}")
    if images.ndim not in (3, 4):
        raise ValueError(f"images: expected shape (N, H, W, C) or (H, W, C), got {images.shape}")
    if images.dtype.name not in _PIXELS:
        raise TypeError(f"images: expected one of {', '.join(_PIXELS)}, got {images.dtype}")
    batch = images if images.ndim == 4 else images[None]
    n, height, width, channels = batch.shape
    try:
        out_height, out_width = (height, width) if size is None else (int(side) for side in size)
    except (TypeError, ValueError):
        raise ValueError(f"size: expected (height, width), got {size!r}") from None
    for name, side, least in (
        ("images", height, 1), ("images", width, 1), ("size", out_height, 0), ("size", out_width, 0),
    ):  # fmt: skip
        if not least <= side < 1 << 30:
            raise ValueError(f"{name}: expected sides between {least} and {(1 << 30) - 1}, got {side}")
    one_of("interpolation", interpolation, ("nearest", "bilinear", "bicubic"))
    one_of("padding_mode", padding_mode, ("constant", "edge", "reflect", "symmetric"))
    fills = per_channel("fill", fill, channels)
    if images.dtype == np.uint8:
        fills = uint8_fill(fills)
    means, stds = normalization(mean, std, channels)
    out_dtype = images.dtype if dtype is None else np.dtype(dtype)
    if out_dtype.name not in _PIXELS:
        raise TypeError(f"dtype: expected one of {', '.join(_PIXELS)}, got {out_dtype}")
    if stds and out_dtype == np.uint8:
        raise ValueError("mean, std: expected a floating output, got dtype uint8; pass dtype=np.float32")
    homographies = _homographies(matrix, n)
    tables = None
    if table is not None:
        if images.dtype != np.uint8:
            raise TypeError(f"table: expected uint8 images with it, got {images.dtype} images")
        if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
            raise TypeError(f"table: expected a uint8 array, got {getattr(table, 'dtype', type(table).__name__)}")
        tables = np.ascontiguousarray(_leading("table", table, n, [(channels, 256)]))
    colors = None
    if color_matrix is not None:
        if channels != 3:
            raise ValueError(f"color_matrix: expected images with 3 channels, got {channels}")
        colors = np.ascontiguousarray(_leading("color_matrix", _floating("color_matrix", color_matrix), n, [(3, 4)]))

    if _native.backend() != "native":
        result = _affine_warp_by_torch(
            batch, homographies, (out_height, out_width), interpolation, padding_mode, fills, antialias, tables, colors,
            means, stds, out_dtype,
        )  # fmt: skip
    else:
        core = _native.core()
        assert core is not None
        if not batch.flags.aligned or any(s < 0 or s % batch.itemsize for s in batch.strides):
            batch = np.ascontiguousarray(batch)
        if channels_first:
            result = np.empty((n, channels, out_height, out_width), out_dtype)
        else:
            result = np.empty((n, out_height, out_width, channels), out_dtype).transpose(0, 3, 1, 2)
        core.affine_warp(
            batch.transpose(0, 3, 1, 2), result, homographies, interpolation, padding_mode, fills, antialias, tables,
            colors, means, stds,
        )  # fmt: skip
    if not channels_first:
        result = result.transpose(0, 2, 3, 1)
    return result if images.ndim == 4 else result[0]


def _homographies(matrix: NDArray[Any], n: int) -> NDArray[np.float64]:
    values = _leading("matrix", _floating("matrix", matrix), n, [(2, 3), (3, 3)])
    if values.shape[1] == 3:
        return np.ascontiguousarray(values)
    last = np.broadcast_to(np.array([[0.0, 0.0, 1.0]]), (len(values), 1, 3))
    return np.concatenate([values, last], 1)


def _floating(name: str, array: NDArray[Any]) -> NDArray[np.float64]:
    if not isinstance(array, np.ndarray) or array.dtype.name not in ("float32", "float64"):
        raise TypeError(
            f"{name}: expected a float32 or float64 array, got {getattr(array, 'dtype', type(array).__name__)}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values")
    return array.astype(np.float64)


def _leading(name: str, array: NDArray[Any], n: int, shapes: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """`array` with a leading dimension of 1 or `n`."""
    values = array if array.ndim == 3 else array[None]
    if values.ndim != 3 or values.shape[1:] not in shapes or values.shape[0] not in (1, n):
        expected = " or ".join(f"(N, {a}, {b})" for a, b in shapes)
        raise ValueError(f"{name}: expected shape {expected} with N = {n} or 1, or without N, got {array.shape}")
    return values


def _affine_warp_by_torch(
    batch: NDArray[Any], matrix: NDArray[np.float64], size: tuple[int, int], interpolation: str, padding_mode: str,
    fill: list[float], antialias: bool, table: NDArray[np.uint8] | None, colors: NDArray[np.float64] | None,
    mean: list[float], std: list[float], dtype: Any,
) -> NDArray[Any]:  # fmt: skip
    import torch

    from imgopt_fast.ops.affine_warp import affine_warp as warp

    result = warp(
        torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2),
        torch.from_numpy(matrix),
        size=size,
        interpolation=interpolation,
        padding_mode=padding_mode,
        fill=fill,
        antialias=antialias,
        table=None if table is None else torch.from_numpy(table),
        color_matrix=None if colors is None else torch.from_numpy(colors),
        mean=mean or None,
        std=std or None,
        dtype=getattr(torch, dtype.name),
    )
    found: NDArray[Any] = result.numpy()
    return found


# --- masked_matmul ---------------------------------------------------------------------------------------------------

_REALS = ("float16", "float32", "float64")


class PackedMaskedWeight(NamedTuple):
    """`imgopt_fast.PackedMaskedWeight` of a linear, as arrays. Made by `pack_masked_weight`."""

    values: NDArray[Any]
    quads: NDArray[np.int32]
    columns: NDArray[Any]
    shape: tuple[int, int]
    block: int


def pack_masked_weight(weight: NDArray[Any], mask: NDArray[np.bool_]) -> PackedMaskedWeight:
    """`imgopt_fast.pack_masked_weight` for arrays: the kept values of `weight`, ready for `masked_matmul`.

    `weight` (O, K) is float16, float32 or float64, `mask` bool of its shape. Raises TypeError and ValueError for
    anything else.
    """
    _real("weight", weight)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"mask: expected a bool array, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if weight.ndim != 2:
        raise ValueError(f"weight: expected (O, K), got shape {weight.shape}")
    if mask.shape != weight.shape:
        raise ValueError(f"mask: expected the weight's shape {weight.shape}, got {mask.shape}")
    rows, width = weight.shape
    block = block_columns(mask, _native.active_isa())
    if _native.backend() == "native":
        core = _native.core()
        assert core is not None
        quads, columns, position = core.mask_structure(mask, block)
    else:
        from imgopt_fast.ops.masked_matmul.reference import structure

        quads, columns, position = structure(mask, block)
    values = np.zeros(len(position), weight.dtype)
    real = position >= 0
    values[real] = weight.reshape(-1)[position[real]]
    return PackedMaskedWeight(values, quads, columns, (rows, width), block)


def masked_matmul(
    input: NDArray[Any],
    weight: NDArray[Any] | PackedMaskedWeight,
    mask: NDArray[np.bool_] | None = None,
    bias: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`input @ where(mask, weight, 0).T + bias` for the kept weights only: `imgopt_fast.masked_matmul` for arrays.

    `input` (..., K), `weight` (O, K) and `bias` (O,) share a dtype of float16 (summed in float32), float32 or
    float64. A weight that is used again is better packed once, by `pack_masked_weight`; `mask` is then left out.
    Raises TypeError and ValueError for anything else.
    """
    _real("input", input)
    if isinstance(weight, PackedMaskedWeight):
        if mask is not None:
            raise ValueError("mask: expected None with a packed weight, which holds its own")
        packed = weight
    elif mask is None:
        raise TypeError("mask: expected a bool array, got None")
    else:
        packed = pack_masked_weight(weight, mask)
    rows, width = packed.shape
    if input.ndim == 0 or input.shape[-1] != width:
        raise ValueError(f"input: expected (..., {width}) for weight {packed.shape}, got {input.shape}")
    if packed.values.dtype != input.dtype:
        raise TypeError(f"weight: expected the input's dtype {input.dtype}, got {packed.values.dtype}")
    if bias is not None:
        _real("bias", bias)
        if bias.dtype != input.dtype:
            raise TypeError(f"bias: expected the input's dtype {input.dtype}, got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"bias: expected shape ({rows},), got {bias.shape}")
    if _native.backend() != "native":
        return _masked_matmul_by_torch(input, packed, bias)
    core = _native.core()
    assert core is not None
    output = np.empty((*input.shape[:-1], rows), input.dtype)
    samples = math.prod(input.shape[:-1])
    values = packed.values.astype(np.float64 if input.dtype == np.float64 else np.float32, copy=False)
    offsets = None if bias is None else np.ascontiguousarray(bias)
    core.masked_matmul(
        np.ascontiguousarray(input).reshape(samples, width), values, offsets,
        packed.quads, packed.columns, packed.block, output.reshape(samples, rows),
    )  # fmt: skip
    return output


def _real(name: str, array: NDArray[Any]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.name not in _REALS:
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name}: expected a float16, float32 or float64 array, got {got}")


def _masked_matmul_by_torch(input: NDArray[Any], weight: PackedMaskedWeight, bias: NDArray[Any] | None) -> NDArray[Any]:
    import torch

    from imgopt_fast.ops import masked_matmul as op

    packed = op.PackedMaskedWeight(
        torch.from_numpy(weight.values), torch.from_numpy(weight.quads), torch.from_numpy(weight.columns), weight.shape,
        weight.block, 0, 1,
    )  # fmt: skip
    result = op.masked_matmul(
        torch.from_numpy(np.ascontiguousarray(input)), packed, None,
        None if bias is None else torch.from_numpy(np.ascontiguousarray(bias)),
    )  # fmt: skip
    found: NDArray[Any] = result.numpy()
    return found


# --- int8_conv2d -----------------------------------------------------------------------------------------------------

_RANGES = {"uint8": (0, 255), "int8": (-128, 127)}
# The calls with packed weights that were made before, as the compiled function takes them.
_CALLS: PreparedCalls[NDArray[np.uint8]] = PreparedCalls()


class PackedInt8Weight(NamedTuple):
    """`imgopt_fast.PackedInt8Weight` as arrays. Made by `pack_int8_weight`."""

    weight: NDArray[np.int8]
    bias: NDArray[np.int32]
    weight_scale: NDArray[np.float32]
    packed: NDArray[np.uint8]  # the kernel's order, for one instruction set; packed anew in each call of another
    input_scale: float
    input_zero_point: int
    groups: int


def pack_int8_weight(
    weight: NDArray[np.int8],
    weight_scale: float | NDArray[np.floating[Any]],
    bias: NDArray[np.floating[Any]] | None = None,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    groups: int = 1,
) -> PackedInt8Weight:
    """`imgopt_fast.pack_int8_weight` for arrays: checks and packs a layer once, with the same errors."""
    check_zero_point("input_zero_point", input_zero_point, -128, 255)
    layer = _int8_layer(weight, weight_scale, bias, input_scale, input_zero_point, groups)
    for values in _RANGES.values():
        if values[0] <= input_zero_point <= values[1]:
            _check_sums(layer.weight, layer.bias, input_zero_point, values)
    return layer if _native.backend() != "native" else layer._replace(packed=_pack(layer))


def int8_conv2d(
    input: NDArray[Any],
    weight: NDArray[np.int8] | PackedInt8Weight,
    bias: NDArray[np.floating[Any]] | None = None,
    *,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    weight_scale: float | NDArray[np.floating[Any]] | None = None,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: Any = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_min: float | None = None,
    output_max: float | None = None,
    residual: NDArray[Any] | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int = 0,
    requantize: str = "float",
) -> NDArray[Any]:
    """`imgopt_fast.int8_conv2d` for arrays: (N, H, W, C) uint8 or int8 to (N, OH, OW, O), the same bits.

    `weight` is int8 (O, C/groups, kH, kW), as in torch, and then packed in every call, or what `pack_int8_weight`
    returned. The other arguments, the arithmetic and the errors are those of the torch function.
    """
    key = None
    if type(weight) is PackedInt8Weight and type(input) is np.ndarray:
        key = (
            input.dtype.char, residual.dtype.char if isinstance(residual, np.ndarray) else residual, output_scale,
            output_zero_point, output_dtype, stride, padding, dilation, output_min, output_max, residual_scale,
            residual_zero_point, requantize,
            bias is None and input_scale is None and weight_scale is None and groups == 1 and input_zero_point == 0,
        )  # fmt: skip
        call = _CALLS.find(weight, key)
        if call is not None:
            try:
                return _convolve(input, weight.packed, call, residual)
            except ValueError:  # the checks that follow say it better
                pass
    if not isinstance(input, np.ndarray) or input.dtype.name not in _RANGES:
        raise TypeError(f"input: expected a uint8 or int8 array, got {getattr(input, 'dtype', type(input).__name__)}")
    if isinstance(weight, PackedInt8Weight):
        check_packed_alone(bias, input_scale, input_zero_point, weight_scale, groups)
        layer = weight
        check_zero_point("input_zero_point", layer.input_zero_point, *_RANGES[input.dtype.name])
    elif input_scale is None or weight_scale is None:
        raise ValueError("input_scale, weight_scale: expected positive numbers beside an unpacked weight, got None")
    else:
        check_zero_point("input_zero_point", input_zero_point, *_RANGES[input.dtype.name])
        layer = _int8_layer(weight, weight_scale, bias, input_scale, input_zero_point, groups)
        _check_sums(layer.weight, layer.bias, input_zero_point, _RANGES[input.dtype.name])
    group_channels = layer.weight.shape[1]
    if input.ndim != 4 or input.shape[3] != group_channels * layer.groups:
        raise ValueError(f"input: expected (N, H, W, {group_channels * layer.groups}), got {input.shape}")
    strides, sides, dilations = as_pair("stride", stride, 1), as_sides(padding), as_pair("dilation", dilation, 1)
    check_clamp(output_min, output_max)
    if output_scale is None:
        dtype = np.dtype(np.float32)
        if output_zero_point:
            raise ValueError(f"output_zero_point: expected 0 without output_scale, got {output_zero_point}")
    else:
        dtype = input.dtype if output_dtype is None else np.dtype(output_dtype)
        if dtype.name not in _RANGES:
            raise ValueError(f"output_dtype: expected uint8 or int8 with output_scale, got {dtype}")
        check_scale("output_scale", output_scale)
        check_zero_point("output_zero_point", output_zero_point, *_RANGES[dtype.name])
    n, channels, height, width = output_size(
        (input.shape[0], input.shape[3], *input.shape[1:3]), layer.weight.shape, strides, sides, dilations
    )
    if residual is not None:
        if not isinstance(residual, np.ndarray) or residual.dtype.name not in _RANGES:
            got = getattr(residual, "dtype", type(residual).__name__)
            raise TypeError(f"residual: expected a uint8 or int8 array, got {got}")
        if residual.shape != (n, height, width, channels):
            raise ValueError(f"residual: expected shape {(n, height, width, channels)}, got {residual.shape}")
        check_scale("residual_scale", math.nan if residual_scale is None else residual_scale)
        check_zero_point("residual_zero_point", residual_zero_point, *_RANGES[residual.dtype.name])
    elif residual_scale is not None or residual_zero_point:
        raise ValueError("residual: expected an array beside residual_scale or residual_zero_point, got None")
    if one_of("requantize", requantize, ("float", "shift")) == "shift":
        check_shift_scales(input_scale=layer.input_scale, output_scale=output_scale, residual_scale=residual_scale)
        mantissa, exponent = np.frexp(layer.weight_scale)
        if not (mantissa == 0.5).all():
            raise ValueError(f"weight_scale: expected powers of two with requantize='shift', got {layer.weight_scale}")
        check_shift_span(layer.input_scale, int(exponent.min()), int(exponent.max()), residual_scale)
    if _native.backend() != "native":
        return _int8_conv2d_by_torch(
            input, layer, residual, output_scale=output_scale, output_zero_point=output_zero_point, output_dtype=dtype,
            stride=strides, padding=(sides[:2], sides[2:]), dilation=dilations, output_min=output_min,
            output_max=output_max, residual_scale=residual_scale, residual_zero_point=residual_zero_point,
            requantize=requantize,
        )  # fmt: skip
    core = _native.core()
    assert core is not None

    def prepare(packed: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        found: NDArray[np.uint8] | None = core.int8_conv2d_prepare(
            layer.weight.shape, layer.groups, packed, layer.bias, layer.weight_scale, input.dtype == np.int8,
            None if residual is None else residual.dtype == np.int8, dtype == np.int8, layer.input_scale,
            layer.input_zero_point, output_scale, output_zero_point, strides, sides, dilations, output_min, output_max,
            1.0 if residual_scale is None else residual_scale, residual_zero_point, requantize == "shift",
        )  # fmt: skip
        return found

    call, packed = prepare(layer.packed), layer.packed
    if call is None:  # not packed, or for another instruction set
        packed = _pack(layer)
        call = prepare(packed)
        assert call is not None
    elif key is not None:
        _CALLS.remember(layer, key, call)
    return _convolve(input, packed, call, residual)


def _pack(layer: PackedInt8Weight) -> NDArray[np.uint8]:
    core = _native.core()
    assert core is not None
    size = core.int8_conv2d_packed_bytes(layer.weight.shape, layer.groups)
    memory = np.empty(size + 63, np.uint8)
    packed = memory[-memory.ctypes.data % 64 :][:size]  # the kernels read whole cache lines
    core.int8_conv2d_pack(layer.weight, layer.groups, packed)
    return packed


def _convolve(
    input: NDArray[Any], packed: NDArray[np.uint8], call: NDArray[np.uint8], residual: NDArray[Any] | None
) -> NDArray[Any]:
    core = _native.core()
    assert core is not None
    result: NDArray[Any] = core.int8_conv2d(
        np.ascontiguousarray(input), packed, call, None if residual is None else np.ascontiguousarray(residual)
    )
    return result


def _int8_layer(
    weight: NDArray[np.int8], weight_scale: float | NDArray[Any], bias: NDArray[Any] | None, input_scale: float,
    input_zero_point: int, groups: int,
) -> PackedInt8Weight:  # fmt: skip
    """A layer without packed bytes, checked but for its sums, whose bound depends on the input's dtype."""
    if not isinstance(weight, np.ndarray) or weight.dtype != np.int8:
        raise TypeError(f"weight: expected an int8 array, got {getattr(weight, 'dtype', type(weight).__name__)}")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected (O, C/groups, kH, kW) with no empty axis, got {weight.shape}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups}")
    check_scale("input_scale", input_scale)
    scale = _channel_scales(weight_scale, weight.shape[0])
    steps = _quantized_bias(bias, scale, input_scale)
    nothing = np.empty(0, np.uint8)
    return PackedInt8Weight(
        np.ascontiguousarray(weight), steps, scale, nothing, float(input_scale), input_zero_point, groups
    )


def _channel_scales(weight_scale: float | NDArray[Any], channels: int) -> NDArray[np.float32]:
    scale = np.asarray(weight_scale, np.float32)
    if scale.ndim > 1 or scale.size not in (1, channels):
        raise ValueError(f"weight_scale: expected 1 or {channels} numbers, got shape {scale.shape}")
    for channel, value in enumerate(scale.reshape(-1)):
        if not SCALE_MIN <= value <= SCALE_MAX:
            raise ValueError(
                f"weight_scale: expected positive finite numbers in [2^-48, 2^24], got {value} for output channel "
                f"{channel}"
            )
    return np.array(np.broadcast_to(scale, channels))


def _quantized_bias(bias: NDArray[Any] | None, scale: NDArray[np.float32], input_scale: float) -> NDArray[np.int32]:
    if bias is None:
        return np.zeros(len(scale), np.int32)
    if bias.dtype.kind != "f":
        raise TypeError(f"bias: expected floats in real units, got {bias.dtype}")
    if bias.shape != scale.shape:
        raise ValueError(f"bias: expected {scale.shape}, got {bias.shape}")
    steps = bias.astype(np.float64) / (float(input_scale) * scale.astype(np.float64))
    for channel, value in enumerate(steps):
        if not abs(value) <= 2**31 - 1:
            raise ValueError(
                f"bias: {bias[channel]} of output channel {channel} is {value:.3g} steps of input_scale*weight_scale, "
                f"which int32 cannot hold; use a larger weight_scale for this channel"
            )
    return np.rint(steps).astype(np.int32)


def _check_sums(weight: NDArray[np.int8], bias: NDArray[np.int32], zero_point: int, values: tuple[int, int]) -> None:
    w = weight.reshape(len(weight), -1).astype(np.int64)
    positive, negative = np.maximum(w, 0).sum(1), np.maximum(-w, 0).sum(1)
    above, below = values[1] - zero_point, zero_point - values[0]
    highest = bias + positive * above + negative * below
    lowest = bias - positive * below - negative * above
    for channel in np.flatnonzero((highest > 2**31 - 1) | (lowest < -(2**31))):
        raise ValueError(
            f"weight: the sum of output channel {channel} could reach {highest[channel]} or {lowest[channel]}, outside "
            f"of int32; expected fewer than {w.shape[1]} weights, smaller ones, or a smaller bias"
        )


def _int8_conv2d_by_torch(
    input: NDArray[Any], layer: PackedInt8Weight, residual: NDArray[Any] | None, *, output_dtype: Any, **settings: Any
) -> NDArray[Any]:
    import torch

    from imgopt_fast.ops import int8_conv2d as op

    def image(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)

    weight, bias, scale, packed = (torch.from_numpy(array) for array in layer[:4])
    result = op.int8_conv2d(
        image(input),
        op.PackedInt8Weight(weight, bias, scale, packed, layer.input_scale, layer.input_zero_point, layer.groups),
        residual=None if residual is None else image(residual),
        output_dtype=getattr(torch, output_dtype.name),
        **settings,
    )
    found: NDArray[Any] = result.permute(0, 2, 3, 1).numpy()
    return found
