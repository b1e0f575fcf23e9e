"""Lookup tables of 256 levels: what posterize, solarize, invert, autocontrast and equalize come down to on uint8.

`imgopt_fast.affine_warp(images, matrix, table=...)` applies them to the source pixels in the pass that warps. The
results are Pillow's (ImageOps), up to a rounding of its float scale in autocontrast.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from imgopt_fast.ops.photometric import level_histogram

Table = NDArray[np.uint8]

_LEVELS = np.arange(256)


def posterize(bits: ArrayLike) -> Table:
    """Keeps the `bits` (...) highest bits of every level: (..., 256)."""
    dropped: NDArray[np.int64] = 8 - np.asarray(bits, np.int64)[..., None]
    return (_LEVELS >> dropped << dropped).astype(np.uint8)


def solarize(threshold: ArrayLike) -> Table:
    """Inverts the levels from `threshold` (...), in 0 to 255, on: (..., 256)."""
    return np.where(np.asarray(threshold)[..., None] <= _LEVELS, 255 - _LEVELS, _LEVELS).astype(np.uint8)


def invert() -> Table:
    """255 - level: (256,)"""
    return (255 - _LEVELS).astype(np.uint8)


def autocontrast(images: torch.Tensor) -> torch.Tensor:
    """Stretches the levels of each channel of uint8 images (N, C, H, W) over the full range: (N, C, 256)."""
    present = level_histogram(images) > 0
    levels = torch.arange(256, device=images.device)
    low = torch.where(present, levels, 255).amin(2, keepdim=True)
    high = torch.where(present, levels, 0).amax(2, keepdim=True)
    stretched = (levels - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.clamp(0, 255), levels).to(torch.uint8)


def equalize(images: torch.Tensor) -> torch.Tensor:
    """Levels the histogram of each channel of uint8 images (N, C, H, W): (N, C, 256)."""
    counts = level_histogram(images)
    levels = torch.arange(256, device=images.device)
    last = torch.where(counts > 0, levels, 0).amax(2, keepdim=True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255
    below = counts.cumsum(2) - counts
    levelled = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, levelled.clamp(max=255), levels).to(torch.uint8)
