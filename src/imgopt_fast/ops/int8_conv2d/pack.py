"""The weights of int8_conv2d: checked, and brought into the order of the active kernel.

Everything that depends on the weights alone is done once by `pack_int8_weight`; an unpacked weight goes through the
same checks and is packed again in every call.
"""

from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast._arguments import (
    SCALE_MAX,
    SCALE_MIN,
    check_scale,
    check_shift_scales,
    check_shift_span,
    check_zero_point,
    described,
)
from imgopt_fast.ops import registration
from imgopt_fast.ops.int8_conv2d.reference import INTEGER_RANGE

INT32_MAX = 2**31 - 1
CUDA_ROW = 64  # bytes that the CUDA kernel takes of a row of weights at a time


class PackedInt8Weight(NamedTuple):
    """What `int8_conv2d` needs to know about a layer, prepared once by `pack_int8_weight`; not to be written to."""

    weight: Tensor  # int8 (O, C/groups, kH, kW): the canonical weight
    bias: Tensor  # int32 (O,), at scale input_scale * weight_scale[o]
    weight_scale: Tensor  # float32 (O,)
    packed: Tensor  # uint8: the weight in one kernel's order, behind a header that says which; may be empty
    input_scale: float
    input_zero_point: int
    groups: int


def pack_int8_weight(
    weight: Tensor,
    weight_scale: float | Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: float,
    input_zero_point: int = 0,
    groups: int = 1,
) -> PackedInt8Weight:
    """Check a layer's weights and bring them into the order of the active kernel.

    Args:
        weight: int8 (O, C/groups, kH, kW), symmetric: real weight = weight * weight_scale[o].
        weight_scale: positive, one number or (O,) floats; kept as float32.
        bias: (O,) floats in real units, or None. Rounded half to even, once, to int32 at scale
            `input_scale * weight_scale[o]`, as in ONNX QLinearConv and TFLite.
        input_scale: positive scale of the activations that the layer will see.
        input_zero_point: their zero point, 0..255 for uint8 input and -128..127 for int8 input.
        groups: as in `torch.nn.functional.conv2d`.

    Raises:
        TypeError: `weight` is not int8, or `bias` not floating.
        ValueError: a shape, scale or zero point is out of range, or the sum of a channel could leave int32; the
            message names the argument and the channel. The bound is exact for the given weights: with
            d = input - input_zero_point, every sum lies between `bias - ΣW⁺·(-min d) - ΣW⁻·max d` and
            `bias + ΣW⁺·max d + ΣW⁻·(-min d)`, W⁺ and W⁻ the magnitudes of the positive and negative weights.

    The packed bytes belong to one instruction set. Elsewhere they are ignored, and every call packs anew.
    """
    _check_weight(weight, groups)
    scale = _scale_tensor(weight_scale, weight)
    check_scale("input_scale", input_scale)
    input_zero_point = check_zero_point("input_zero_point", input_zero_point, -128, 255)
    _check_scale_values(scale)
    _check_bias(bias, weight)
    bias_int32 = _quantize_bias(bias, scale, input_scale)
    _check_sums(weight, bias, scale, bias_int32, input_scale, input_zero_point)
    canonical = weight.detach().contiguous()
    return PackedInt8Weight(
        canonical, bias_int32, scale, pack_bytes(canonical, groups), float(input_scale), input_zero_point, groups
    )


def pack_bytes(weight: Tensor, groups: int) -> Tensor:
    """`weight` in the order of the kernel of its device; empty where no compiled kernel will read it.

    A processor's bytes stand behind a header that says whose they are; those of CUDA have two axes instead.
    """
    if weight.is_cuda and registration.has_kernel("int8_conv2d", "CUDA"):
        return cuda_rows(weight)
    core = _native.core()
    if core is None or _native.backend() != "native" or weight.device.type != "cpu":
        return torch.empty(0, dtype=torch.uint8, device=weight.device)
    packed = torch.empty(core.int8_conv2d_packed_bytes(tuple(weight.shape), groups), dtype=torch.uint8)
    core.int8_conv2d_pack(weight.numpy(), groups, packed.numpy())
    return packed


def cuda_rows(weight: Tensor) -> Tensor:
    """`weight` as the CUDA kernels read it: uint8 (O, taps * C / groups, padded with zeros)."""
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % CUDA_ROW)).view(torch.uint8)


def unpacked_layer(
    weight: Tensor,
    bias: Tensor | None,
    weight_scale: float | Tensor | None,
    input_scale: float | None,
    input_zero_point: int,
    groups: int,
) -> PackedInt8Weight:
    """An unpacked weight as a layer with no packed bytes. Compiled graphs skip the checks that look at values."""
    if input_scale is None:
        raise ValueError("input_scale: expected a positive number beside an unpacked weight, got None")
    if weight_scale is None:
        raise ValueError("weight_scale: expected a positive number or a tensor beside an unpacked weight, got None")
    _check_weight(weight, groups)
    check_scale("input_scale", input_scale)
    input_zero_point = check_zero_point("input_zero_point", input_zero_point, -128, 255)
    _check_bias(bias, weight)
    scale = _scale_tensor(weight_scale, weight)
    bias_int32 = _quantize_bias(bias, scale, input_scale)
    if not torch.compiler.is_compiling():
        _check_scale_values(scale)
        _check_sums(weight, bias, scale, bias_int32, input_scale, input_zero_point)
    packed = torch.empty(0, dtype=torch.uint8, device=weight.device)
    return PackedInt8Weight(weight, bias_int32, scale, packed, input_scale, input_zero_point, groups)


def _scale_tensor(weight_scale: float | Tensor, weight: Tensor) -> Tensor:
    channels = weight.shape[0]
    if isinstance(weight_scale, Tensor):
        if not weight_scale.is_floating_point():
            raise TypeError(f"weight_scale: expected floats, got {weight_scale.dtype}")
        if weight_scale.dim() > 1 or (weight_scale.dim() == 1 and weight_scale.shape[0] not in (1, channels)):
            raise ValueError(f"weight_scale: expected 1 or {channels} numbers, got shape {tuple(weight_scale.shape)}")
        if weight_scale.device != weight.device:
            raise ValueError(f"weight_scale: expected on the weight's {weight.device}, got {weight_scale.device}")
        return weight_scale.detach().to(torch.float32).expand(channels).contiguous()
    if not isinstance(weight_scale, Real):
        raise TypeError(f"weight_scale: expected a number or a tensor of floats, got {type(weight_scale).__name__}")
    check_scale("weight_scale", weight_scale)
    return torch.full((channels,), weight_scale, dtype=torch.float32, device=weight.device)


def _quantize_bias(bias: Tensor | None, scale: Tensor, input_scale: float) -> Tensor:
    if bias is None:
        return torch.zeros(scale.shape[0], dtype=torch.int32, device=scale.device)
    # Channels that leave int32 or are not finite are reported by _check_sums.
    steps = bias.detach().double() / (float(input_scale) * scale.double())
    return torch.round(steps).nan_to_num(0.0).clamp(-(2.0**31), INT32_MAX).to(torch.int32)


def _check_weight(weight: Tensor, groups: int) -> None:
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        raise TypeError(f"weight: expected an int8 tensor, got {described(weight, Tensor)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight: expected (O, C/groups, kH, kW) with no empty axis, got {tuple(weight.shape)}")
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight.shape[0]} output channels, got {groups}")


def _check_scale_values(scale: Tensor) -> None:
    good = (scale >= SCALE_MIN) & (scale <= SCALE_MAX)
    if not bool(good.all()):
        channel = int(good.logical_not().nonzero()[0])
        raise ValueError(
            f"weight_scale: expected positive finite numbers in [2^-48, 2^24], got {float(scale[channel])} for output "
            f"channel {channel}"
        )


def _check_bias(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"bias: expected a tensor of floats in real units, got {described(bias, Tensor)}")
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias: expected ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias: expected on the weight's {weight.device}, got {bias.device}")


def _check_sums(
    weight: Tensor, bias: Tensor | None, scale: Tensor, bias_int32: Tensor, input_scale: float, zero_point: int
) -> None:
    """No input of either dtype that can have this zero point may carry a channel's sum out of int32."""
    if bias is not None:
        steps = bias.detach().double() / (float(input_scale) * scale.double())
        bad = ~(steps.abs() <= INT32_MAX)
        if bool(bad.any()):
            channel = int(bad.nonzero()[0])
            raise ValueError(
                f"bias: {float(bias[channel])} of output channel {channel} is {float(steps[channel]):.3g} steps of "
                f"input_scale*weight_scale, which int32 cannot hold; expected at most {INT32_MAX}: use a larger "
                f"weight_scale for this channel"
            )
    w = weight.flatten(1).long()
    positive, negative = w.clamp(min=0).sum(1), -w.clamp(max=0).sum(1)
    for least, most in INTEGER_RANGE.values():
        if not least <= zero_point <= most:
            continue  # no input of this dtype
        above, below = most - zero_point, zero_point - least
        highest = bias_int32.long() + positive * above + negative * below
        lowest = bias_int32.long() - positive * below - negative * above
        bad = (highest > INT32_MAX) | (lowest < -INT32_MAX - 1)
        if bool(bad.any()):
            channel = int(bad.nonzero()[0])
            raise ValueError(
                f"weight: the sum of output channel {channel} could reach {int(highest[channel])} or "
                f"{int(lowest[channel])}, outside of int32; expected fewer than {w.shape[1]} weights, smaller ones, "
                f"or a smaller bias"
            )


def check_powers_of_two(layer: PackedInt8Weight, output_scale: float | None, residual_scale: float | None) -> None:
    """ValueError unless requantize='shift' can serve these scales; compiled graphs skip the tensor's values."""
    check_shift_scales(input_scale=layer.input_scale, output_scale=output_scale, residual_scale=residual_scale)
    if torch.compiler.is_compiling():
        return
    mantissa, exponent = torch.frexp(layer.weight_scale)
    bad = mantissa != 0.5
    if bool(bad.any()):
        channel = int(bad.nonzero()[0])
        raise ValueError(
            f"weight_scale: expected powers of two with requantize='shift', got {float(layer.weight_scale[channel])} "
            f"for output channel {channel}"
        )
    check_shift_span(layer.input_scale, int(exponent.min()), int(exponent.max()), residual_scale)
