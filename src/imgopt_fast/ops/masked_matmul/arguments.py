"""What masked_matmul and masked_conv2d accept, and the errors for everything else, which name the argument."""

import torch
from torch import Tensor

from imgopt_fast._arguments import described
from imgopt_fast.ops.masked_matmul.layout import MaskLayout, PackedMaskedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_product(
    input: Tensor,
    weight: Tensor | PackedMaskedWeight,
    mask: Tensor | MaskLayout | None,
    bias: Tensor | None,
    groups: int,
    dims: int,
) -> tuple[int, ...]:
    """Check what a product and a convolution have in common; returns the shape of the weight."""
    if not isinstance(input, Tensor) or input.dtype not in DTYPES:
        raise TypeError(
            f"input: expected a tensor of float32, bfloat16, float16 or float64, got {described(input, Tensor)}"
        )
    if isinstance(weight, PackedMaskedWeight):
        if mask is not None:
            raise ValueError("mask: expected None with a PackedMaskedWeight, which holds its own")
        held, made_for, shape = weight.values, weight.groups, weight.shape
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            raise ValueError(
                "input: expected no gradient through a PackedMaskedWeight: call it under torch.no_grad(), "
                "or train with a MaskLayout"
            )
    else:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight: expected a tensor or a PackedMaskedWeight, got {described(weight, Tensor)}")
        held, made_for, shape = weight, groups, tuple(weight.shape)
        if isinstance(mask, MaskLayout):
            made_for, masked_shape, masked_device = mask.groups, tuple(mask.mask.shape), mask.mask.device
        elif isinstance(mask, Tensor) and mask.dtype == torch.bool:
            masked_shape, masked_device = tuple(mask.shape), mask.device
        else:
            raise TypeError(f"mask: expected a bool tensor or a MaskLayout, got {described(mask, Tensor)}")
        if masked_shape != shape:
            raise ValueError(f"mask: expected the weight's shape {shape}, got {masked_shape}")
        if masked_device != weight.device:
            raise ValueError(f"mask: expected the weight's device {weight.device}, got {masked_device}")
    if len(shape) != dims:
        expected = "(O, K)" if dims == 2 else "(O, C / groups, kH, kW)"
        raise ValueError(f"weight: expected {expected}, got shape {shape}")
    if made_for != groups:
        raise ValueError(f"groups: expected {made_for}, which the mask was analysed with, got {groups}")
    if not isinstance(groups, int) or groups < 1 or shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {shape[0]} outputs, got {groups!r}")
    if held.dtype != input.dtype and not is_lowered(input):
        raise TypeError(f"weight: expected the input's dtype {input.dtype}, got {held.dtype}")
    if held.device != input.device:
        raise ValueError(f"weight: expected the input's device {input.device}, got {held.device}")
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype != held.dtype:
            raise TypeError(
                f"bias: expected a tensor of the weight's dtype {held.dtype}, got {described(bias, Tensor)}"
            )
        if tuple(bias.shape) != shape[:1]:
            raise ValueError(f"bias: expected shape ({shape[0]},), got {tuple(bias.shape)}")
        if bias.device != input.device:
            raise ValueError(f"bias: expected the input's device {input.device}, got {bias.device}")
    return shape


def is_lowered(input: Tensor) -> bool:
    """Whether autocast brings the operands to one lower dtype. It leaves float64 alone, and knows no meta device."""
    return not input.is_meta and input.dtype != torch.float64 and torch.is_autocast_enabled(input.device.type)
