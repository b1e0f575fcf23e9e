"""`int8_conv2d` on NumPy arrays, and the packed layer that it takes."""

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
    described,
    one_of,
    output_size,
)
from imgopt_fast._prepared import PreparedCalls

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
    input_zero_point = check_zero_point("input_zero_point", input_zero_point, -128, 255)
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
    layer = _checked_layer(input, weight, bias, input_scale, input_zero_point, weight_scale, groups)
    strides, sides, dilations = as_pair("stride", stride, 1), as_sides(padding), as_pair("dilation", dilation, 1)
    check_clamp(output_min, output_max)
    dtype = _output_dtype(input, output_dtype, output_scale, output_zero_point)
    n, channels, height, width = output_size(
        (input.shape[0], input.shape[3], *input.shape[1:3]), layer.weight.shape, strides, sides, dilations
    )
    _check_residual(residual, residual_scale, residual_zero_point, (n, height, width, channels))
    if one_of("requantize", requantize, ("float", "shift")) == "shift":
        _check_powers_of_two(layer, output_scale, residual_scale)
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


def _checked_layer(
    input: NDArray[Any], weight: NDArray[np.int8] | PackedInt8Weight, bias: NDArray[Any] | None,
    input_scale: float | None, input_zero_point: int, weight_scale: float | NDArray[Any] | None, groups: int,
) -> PackedInt8Weight:  # fmt: skip
    """The layer that `input` goes into, packed or not."""
    if not isinstance(input, np.ndarray) or input.dtype.name not in _RANGES:
        raise TypeError(f"input: expected a uint8 or int8 array, got {described(input, np.ndarray)}")
    if isinstance(weight, PackedInt8Weight):
        check_packed_alone(bias, input_scale, input_zero_point, weight_scale, groups)
        layer = weight
        check_zero_point("input_zero_point", layer.input_zero_point, *_RANGES[input.dtype.name])
    elif input_scale is None or weight_scale is None:
        raise ValueError("input_scale, weight_scale: expected positive numbers beside an unpacked weight, got None")
    else:
        input_zero_point = check_zero_point("input_zero_point", input_zero_point, *_RANGES[input.dtype.name])
        layer = _int8_layer(weight, weight_scale, bias, input_scale, input_zero_point, groups)
        _check_sums(layer.weight, layer.bias, input_zero_point, _RANGES[input.dtype.name])
    channels = layer.weight.shape[1] * layer.groups
    if input.ndim != 4 or input.shape[3] != channels:
        raise ValueError(f"input: expected (N, H, W, {channels}), got {input.shape}")
    return layer


def _output_dtype(
    input: NDArray[Any], dtype: Any, output_scale: float | None, output_zero_point: int
) -> np.dtype[Any]:  # fmt: skip
    default = np.dtype(np.float32) if output_scale is None else input.dtype
    allowed = ("float32",) if output_scale is None else tuple(_RANGES)
    try:
        found = default if dtype is None else np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.name not in allowed:
        condition = "without" if output_scale is None else "with"
        raise ValueError(f"output_dtype: expected {' or '.join(allowed)} {condition} output_scale, got {dtype}")
    if output_scale is None:
        if output_zero_point:
            raise ValueError(f"output_zero_point: expected 0 without output_scale, got {output_zero_point}")
        return found
    check_scale("output_scale", output_scale)
    check_zero_point("output_zero_point", output_zero_point, *_RANGES[found.name])
    return found


def _check_residual(
    residual: NDArray[Any] | None, scale: float | None, zero_point: int, shape: tuple[int, ...]
) -> None:  # fmt: skip
    if residual is None:
        if scale is not None or zero_point:
            raise ValueError("residual: expected an array beside residual_scale or residual_zero_point, got None")
        return
    if not isinstance(residual, np.ndarray) or residual.dtype.name not in _RANGES:
        raise TypeError(f"residual: expected a uint8 or int8 array, got {described(residual, np.ndarray)}")
    if residual.shape != shape:
        raise ValueError(f"residual: expected shape {shape}, got {residual.shape}")
    check_scale("residual_scale", math.nan if scale is None else scale)
    check_zero_point("residual_zero_point", zero_point, *_RANGES[residual.dtype.name])


def _check_powers_of_two(layer: PackedInt8Weight, output_scale: float | None, residual_scale: float | None) -> None:
    check_shift_scales(input_scale=layer.input_scale, output_scale=output_scale, residual_scale=residual_scale)
    mantissa, exponent = np.frexp(layer.weight_scale)
    if not (mantissa == 0.5).all():
        raise ValueError(f"weight_scale: expected powers of two with requantize='shift', got {layer.weight_scale}")
    check_shift_span(layer.input_scale, int(exponent.min()), int(exponent.max()), residual_scale)


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
        raise TypeError(f"weight: expected an int8 array, got {described(weight, np.ndarray)}")
    if weight.ndim != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected (O, C/groups, kH, kW) with no empty axis, got {weight.shape}")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
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
    if not isinstance(bias, np.ndarray) or bias.dtype.kind != "f":
        raise TypeError(f"bias: expected an array of floats in real units, got {described(bias, np.ndarray)}")
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
