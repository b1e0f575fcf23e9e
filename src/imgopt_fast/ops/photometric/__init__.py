"""Hue and sharpness: the photometric changes that no lookup table and no linear map can stand for.

Everything else that an augmentation does to colours joins the pass of `affine_warp`; these two take a pass each.
csrc/kernels.h defines the arithmetic.
"""

from collections.abc import Sequence

import torch

from imgopt_fast.ops import registration
from imgopt_fast.ops.photometric import reference

Amount = float | Sequence[float] | torch.Tensor


def adjust_hue(images: torch.Tensor, shift: Amount) -> torch.Tensor:
    """Turn the hue of RGB images by `shift` turns of the colour circle, keeping value and saturation (HSV).

    Args:
        images: (N, 3, H, W), uint8 or floating in [0, 1]; contiguous or channels_last.
        shift: a number, or one per sample (N,); 1 / 3 takes red to green.

    Returns:
        As `images`; uint8 rounds half to even. Differentiable in floating images.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape; the text names it.
    """
    _check(images)
    if images.shape[1] != 3:
        raise ValueError(f"images: expected (N, 3, H, W), got {tuple(images.shape)}")
    amounts = _per_sample("shift", shift, images)
    return _hue(images, amounts) if _compiled(images) else reference.adjust_hue(images, amounts)


def adjust_sharpness(images: torch.Tensor, factor: Amount) -> torch.Tensor:
    """Between smoothed (`factor` 0), as they are (1) and sharpened (above 1).

    Smoothing is the mean over 3 × 3 pixels with weight 5 in the middle; the outermost pixels stay (the filter of Pillow
    and torchvision, without their rounding of the smoothed image).

    Args:
        images: (N, C, H, W), uint8 or floating in [0, 1]; contiguous or channels_last.
        factor: a number, or one per sample (N,).

    Returns:
        As `images`, clipped to their range; uint8 rounds half to even. Differentiable in floating images.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape; the text names it.
    """
    _check(images)
    amounts = _per_sample("factor", factor, images)
    return _sharpness(images, amounts) if _compiled(images) else reference.adjust_sharpness(images, amounts)


def _check(images: torch.Tensor) -> None:
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"images: expected (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")


def _per_sample(name: str, amount: Amount, images: torch.Tensor) -> torch.Tensor:
    amounts = torch.as_tensor(amount, dtype=torch.float64, device=images.device)
    if amounts.dim() == 0:
        return amounts.expand(len(images))
    if amounts.shape != (len(images),):
        raise ValueError(f"{name}: expected a number or ({len(images)},), got {tuple(amounts.shape)}")
    return amounts


def _compiled(images: torch.Tensor) -> bool:
    """Whether the kernels serve: they know two dtypes and no gradients."""
    differentiable = images.requires_grad and torch.is_grad_enabled()
    return images.dtype in (torch.uint8, torch.float32) and not differentiable


def _fake(images: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    interleaved = images.shape[1] > 1 and images.stride(1) == 1
    layout = torch.channels_last if interleaved else torch.contiguous_format
    return torch.empty_like(images, memory_format=layout)


_hue = registration.register(
    "adjust_hue(Tensor images, Tensor shift) -> Tensor",
    reference=reference.adjust_hue,
    fallback="photometric:adjust_hue",
    fake=_fake,
)
_sharpness = registration.register(
    "adjust_sharpness(Tensor images, Tensor factor) -> Tensor",
    reference=reference.adjust_sharpness,
    fallback="photometric:adjust_sharpness",
    fake=_fake,
)
