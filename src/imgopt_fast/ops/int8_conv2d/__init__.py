"""int8 quantized 2-d convolution: exact int32 sums, one pinned rounding, the same bits everywhere.

The weights are symmetric per output channel, the activations asymmetric per tensor. What depends on the weights alone
is done once by `pack_int8_weight`; what depends on a call's arguments beside the images, once per packed weight and
call on a processor: checks and 20 arguments of a schema took 8 µs of every call, the same call again takes 3 of its
own. Inference only: the operation has no autograd registration, because that alone costs microseconds per call.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from imgopt_fast import _native
from imgopt_fast._arguments import (
    Padding,
    as_pair,
    as_sides,
    check_clamp,
    check_packed_alone,
    check_scale,
    check_zero_point,
    described,
    output_size,
)
from imgopt_fast._prepared import PreparedCalls
from imgopt_fast.ops import registration
from imgopt_fast.ops.int8_conv2d import reference
from imgopt_fast.ops.int8_conv2d.pack import (
    PackedInt8Weight,
    check_powers_of_two,
    cuda_rows,
    pack_bytes,
    pack_int8_weight,
    unpacked_layer,
)

__all__ = [
    "INTEGER_RANGE",
    "PackedInt8Weight",
    "check_powers_of_two",
    "cuda_rows",
    "int8_conv2d",
    "output_size",
    "pack_bytes",
    "pack_int8_weight",
]

# The values of a quantized tensor, and the zero points that it may have.
INTEGER_RANGE = reference.INTEGER_RANGE
# torch's numbers of the output's dtypes, which a schema takes as well. For every argument that is a torch.dtype the
# dispatcher looks for __torch_function__, 0.7 µs.
DTYPE_NUMBER = {torch.uint8: 0, torch.int8: 1, torch.float32: 6}
# The calls that eager mode has made on a processor, as `int8_conv2d_prepared` takes them.
_CALLS: PreparedCalls[Tensor] = PreparedCalls()


def int8_conv2d(
    input: Tensor,
    weight: Tensor | PackedInt8Weight,
    bias: Tensor | None = None,
    *,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    weight_scale: float | Tensor | None = None,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_min: float | None = None,
    output_max: float | None = None,
    residual: Tensor | None = None,
    residual_scale: float | None = None,
    residual_zero_point: int = 0,
    requantize: Literal["float", "shift"] = "float",
) -> Tensor:
    """Quantized convolution (N, C, H, W) -> (N, O, OH, OW), the output in channels_last memory.

    Args:
        input: uint8 or int8, channels_last preferred; real value = (input - input_zero_point) * input_scale.
        weight: int8 (O, C/groups, kH, kW), or what `pack_int8_weight` returned; then `bias`, `input_scale`,
            `input_zero_point`, `weight_scale` and `groups` come from it and are left out here.
        bias, input_scale, input_zero_point, weight_scale, groups: as for `pack_int8_weight`.
        output_scale: scale of the output; None gives float32 real values.
        output_zero_point: zero point of the output.
        output_dtype: uint8 or int8 (default: the input's) with `output_scale`, float32 without.
        stride, dilation: int or (h, w).
        padding: int, (h, w) or ((top, bottom), (left, right)); a padded tap is real zero.
        output_min, output_max: clamp in real units, after the residual; ReLU is `output_min=0`.
        residual: uint8 or int8 of the output's shape, added before the clamp.
        residual_scale, residual_zero_point: its quantization.
        requantize: "float" or "shift".

    The arithmetic, in float32 without contraction, S the exact int32 sum with bias::

        m[o] = f32(f64(input_scale) * f64(weight_scale[o]) / f64(output_scale))
        y    = f32(S) * m[o]
        y    = y + f32(residual - residual_zero_point) * f32(f64(residual_scale) / f64(output_scale))
        out  = round_half_even(clamp(y, lo, hi)) + output_zero_point

    with lo, hi the range of `output_dtype` minus the zero point, narrowed by f32(output_min / output_scale) and
    f32(output_max / output_scale). Without `output_scale` read 1 for it; nothing is rounded then.
    `requantize="shift"` is what an FPGA does: every scale is a power of two, scale = 2^-p; the sum and the residual
    are shifted left to the finer of their two scales, added, and `out = (t + (1 << (s-1))) >> s` with
    s = p_finer - p_output (s <= 0 shifts left), saturated, clamped to round_half_even(lo) and (hi).

    Raises:
        TypeError: a wrong dtype. ValueError: anything else that is out of range; the message names the argument.
    """
    key = None
    if not is_compiling() and type(weight) is PackedInt8Weight and type(input) is Tensor:
        key = (
            input.dtype, getattr(residual, "dtype", residual), output_scale, output_zero_point, output_dtype,
            stride, padding, dilation, output_min, output_max, residual_scale, residual_zero_point, requantize,
            bias is None and input_scale is None and weight_scale is None and groups == 1 and input_zero_point == 0,
        )  # fmt: skip
        call = _CALLS.find(weight, key)
        if call is not None:
            try:
                again: Tensor = _prepared_op(input, weight.packed, call, residual)
                return again
            except RuntimeError:  # the checks that follow say it better
                pass
    if isinstance(weight, PackedInt8Weight):
        check_packed_alone(bias, input_scale, input_zero_point, weight_scale, groups)
        layer = weight
    else:
        layer = unpacked_layer(weight, bias, weight_scale, input_scale, input_zero_point, groups)
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a uint8 or int8 tensor, got {described(input, Tensor)}")
    shape, kernel, input_dtype = input.shape, layer.weight.shape, input.dtype
    _check_input(input, shape, kernel, input_dtype, layer)
    # The common cases without a call: the checks of a small layer took half as long as its arithmetic.
    strides = [1, 1] if stride == 1 else as_pair("stride", stride, 1)
    dilations = [1, 1] if dilation == 1 else as_pair("dilation", dilation, 1)
    paddings = [0, 0, 0, 0] if padding == 0 else as_sides(padding)
    if output_dtype is None:
        dtype = torch.float32 if output_scale is None else input_dtype
    else:
        dtype = _output_dtype(output_dtype, output_scale)
    if output_scale is not None:
        check_scale("output_scale", output_scale)
        output_zero_point = check_zero_point("output_zero_point", output_zero_point, *INTEGER_RANGE[dtype])
    elif output_zero_point:
        raise ValueError(f"output_zero_point: expected 0 without output_scale, got {output_zero_point}")
    if output_min is not None or output_max is not None:
        check_clamp(output_min, output_max)
    size = output_size(shape, kernel, strides, paddings, dilations)
    if residual is not None or residual_scale is not None or residual_zero_point:
        _check_residual(residual, residual_scale, residual_zero_point, size, input)
    if requantize not in ("float", "shift"):
        raise ValueError(f"requantize: expected 'float' or 'shift', got {requantize!r}")
    if requantize == "shift":
        check_powers_of_two(layer, output_scale, residual_scale)
    arguments = (
        layer.input_scale,
        layer.input_zero_point,
        output_scale,
        output_zero_point,
        DTYPE_NUMBER[dtype],
        strides,
        paddings,
        dilations,
        layer.groups,
        output_min,
        output_max,
        1.0 if residual_scale is None else residual_scale,
        residual_zero_point,
        requantize == "shift",
    )
    if key is not None and input.is_cpu:
        call = _prepare(layer, input_dtype, None if residual is None else residual.dtype, *arguments)
        if call is not None:
            _CALLS.remember(layer, key, call)
            first: Tensor = _prepared_op(input, layer.packed, call, residual)
            return first
    output: Tensor = _op(
        input, layer.weight, layer.bias, layer.weight_scale, layer.packed, residual, *arguments
    )  # fmt: skip
    return output


def _prepare(
    layer: PackedInt8Weight,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    input_scale: float,
    input_zero_point: int,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_min: float | None,
    output_max: float | None,
    residual_scale: float,
    residual_zero_point: int,
    shift: bool,
) -> Tensor | None:
    """A checked call as `int8_conv2d_prepared` takes it; None where no compiled kernel reads the packed bytes."""
    core = _native.core()
    if core is None or _native.backend() != "native" or layer.packed.numel() == 0:
        return None
    found = core.int8_conv2d_prepare(
        tuple(layer.weight.shape), groups, layer.packed.numpy(), layer.bias.numpy(), layer.weight_scale.numpy(),
        input_dtype == torch.int8, None if residual_dtype is None else residual_dtype == torch.int8,
        output_dtype == DTYPE_NUMBER[torch.int8], input_scale, input_zero_point, output_scale, output_zero_point,
        stride, padding, dilation, output_min, output_max, residual_scale, residual_zero_point, shift,
    )  # fmt: skip
    return None if found is None else torch.from_numpy(found)


def _check_input(
    input: Tensor, shape: Sequence[int], kernel: Sequence[int], dtype: torch.dtype, layer: PackedInt8Weight
) -> None:
    if dtype not in INTEGER_RANGE:
        raise TypeError(f"input: expected uint8 or int8, got {dtype}")
    channels = kernel[1] * layer.groups
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(f"input: expected (N, {channels}, H, W), got {tuple(shape)}")
    if not (input.is_cpu and layer.weight.is_cpu) and input.device != layer.weight.device:
        raise ValueError(f"input: expected on the weight's {layer.weight.device}, got {input.device}")
    check_zero_point("input_zero_point", layer.input_zero_point, *INTEGER_RANGE[dtype])


def _check_residual(
    residual: Tensor | None, scale: float | None, zero_point: int, size: Sequence[int], input: Tensor
) -> None:
    if residual is None:
        if scale is not None or zero_point:
            raise ValueError("residual: expected a tensor beside residual_scale or residual_zero_point, got None")
        return
    if scale is None:
        raise ValueError("residual_scale: expected a positive number beside residual, got None")
    if not isinstance(residual, Tensor) or residual.dtype not in INTEGER_RANGE:
        raise TypeError(f"residual: expected a uint8 or int8 tensor, got {described(residual, Tensor)}")
    if list(residual.shape) != list(size):
        raise ValueError(f"residual: expected the output's shape {tuple(size)}, got {tuple(residual.shape)}")
    if residual.device != input.device:
        raise ValueError(f"residual: expected on the input's {input.device}, got {residual.device}")
    check_scale("residual_scale", scale)
    check_zero_point("residual_zero_point", zero_point, *INTEGER_RANGE[residual.dtype])


def _output_dtype(dtype: torch.dtype, output_scale: float | None) -> torch.dtype:
    allowed = (torch.float32,) if output_scale is None else tuple(INTEGER_RANGE)
    if dtype not in allowed:
        names = " or ".join(str(d) for d in allowed)
        raise ValueError(
            f"output_dtype: expected {names} {'without' if output_scale is None else 'with'} output_scale, got {dtype}"
        )
    return dtype


def _fake(
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
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    return torch.empty(size, dtype=output_dtype, device=input.device, memory_format=torch.channels_last)


_op = registration.register(
    "int8_conv2d(Tensor input, Tensor weight, Tensor bias, Tensor weight_scale, Tensor packed, Tensor? residual, "
    "float input_scale, int input_zero_point, float? output_scale, int output_zero_point, ScalarType output_dtype, "
    "int[] stride, int[] padding, int[] dilation, int groups, float? output_min, float? output_max, "
    "float residual_scale, int residual_zero_point, bool shift) -> Tensor",
    reference=reference.int8_conv2d,
    fallback="int8_conv2d:int8_conv2d",
    fake=_fake,
)
# Never traced, and only for what `_prepare` made: the public function calls it in eager mode.
_prepared_op = registration.register_native(
    "int8_conv2d_prepared(Tensor input, Tensor packed, Tensor prepared, Tensor? residual) -> Tensor"
)
