"""What an augmentation does to colours outside the pass of `affine_warp`, a pass each.

Hue and sharpness, which no lookup table and no linear map can stand for, tables alone, and the sums and histograms from
which tables and linear maps are made. csrc/photometric/contract.h defines the arithmetic.
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


def apply_table(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace each level of uint8 images (N, C, H, W) by that of `table` (N or 1, C, 256) uint8; new memory.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or shape; the text names it.
    """
    _check_levels(images)
    if table.dtype != torch.uint8:
        raise TypeError(f"table: expected uint8, got {table.dtype}")
    n, channels = images.shape[:2]
    if table.dim() != 3 or table.shape[1:] != (channels, 256) or table.shape[0] not in (1, n):
        raise ValueError(f"table: expected ({n} or 1, {channels}, 256), got {tuple(table.shape)}")
    return _lookup(images, table)  # type: ignore[no-any-return]


def channel_sums(images: torch.Tensor) -> torch.Tensor:
    """(N, C) int64: the sum of the levels of each channel of uint8 images (N, C, H, W).

    Raises:
        TypeError, ValueError: `images` has a wrong type, dtype or shape.
    """
    _check_levels(images)
    return _sums(images)  # type: ignore[no-any-return]


def level_histogram(images: torch.Tensor) -> torch.Tensor:
    """(N, C, 256) int64: how often each level occurs in each channel of uint8 images (N, C, H, W).

    Raises:
        TypeError, ValueError: `images` has a wrong type, dtype or shape.
    """
    _check_levels(images)
    return _histogram(images)  # type: ignore[no-any-return]


def _check_levels(images: torch.Tensor) -> None:
    _check(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected uint8, got {images.dtype}")


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
_lookup = registration.register(
    "apply_table(Tensor images, Tensor table) -> Tensor",
    reference=reference.apply_table,
    fallback="photometric:apply_table",
    fake=_fake,
)
_sums = registration.register(
    "channel_sums(Tensor images) -> Tensor",
    reference=reference.channel_sums,
    fallback="photometric:channel_sums",
    fake=lambda images: images.new_empty(images.shape[:2], dtype=torch.int64),
)
_histogram = registration.register(
    "level_histogram(Tensor images) -> Tensor",
    reference=reference.level_histogram,
    fallback="photometric:level_histogram",
    fake=lambda images: images.new_empty((*images.shape[:2], 256), dtype=torch.int64),
)
