"""What some transforms have to know of the images before they can act: mean colours and histograms.

On the CPU NumPy takes them, several times faster than torch, which widens every pixel in memory first: for the mean
of 64 uint8 images of 3 × 224 × 224 one thread takes 1.2 ms (1.0 ms channels_last) against 23 ms, for their histograms
17 ms against 63 ms. Elsewhere, and in compiled graphs, torch does, on the images' device and without a synchronisation.
"""

import numpy as np
import torch
from numpy.typing import NDArray

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; they sum to one, so grey stays grey
ROWS_IN_16_BITS = 257  # 257 · 255 = 2^16 - 1


def luma_weights(channels: int) -> tuple[float, ...]:
    """How much each channel weighs in the grey: BT.601 for three, equal for any other number."""
    return LUMA if channels == 3 else (1.0 / channels,) * channels


def mean_color(images: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
    """(N, C) float64: the mean of each channel, in units of [0, 1]; of uint8 images after the table if there is one."""
    pixels = images.shape[2] * images.shape[3]
    if images.dtype != torch.uint8:
        return images.mean(dim=(2, 3), dtype=torch.float64)
    if table is not None:
        return (histogram(images) * table.to(torch.float64)).sum(2) / (255 * pixels)
    if not _on_numpy(images):
        return images.sum(dim=(2, 3), dtype=torch.int64).to(torch.float64) / (255 * pixels)
    n, channels, height, width = images.shape
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        columns = _column_sums(images.permute(0, 2, 3, 1).numpy().reshape(n, height, width * channels))
        sums = columns.reshape(n, width, channels).sum(axis=1)
    else:
        sums = _column_sums(images.numpy().reshape(n * channels, height, width)).sum(axis=1).reshape(n, channels)
    return torch.from_numpy(sums / (255.0 * pixels))


def _column_sums(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sums over axis 1, as many rows at a time as 16 bits hold: NumPy adds those in vectors twice as long."""
    total = np.zeros((rows.shape[0], rows.shape[2]), np.uint64)
    for first in range(0, rows.shape[1], ROWS_IN_16_BITS):
        total += rows[:, first : first + ROWS_IN_16_BITS].sum(axis=1, dtype=np.uint16)
    return total


def histogram(images: torch.Tensor) -> torch.Tensor:
    """(N, C, 256) int64: how often each level occurs in each channel of uint8 images."""
    shape = (*images.shape[:2], 256)
    if _on_numpy(images):
        planes = images.flatten(0, 1).flatten(1).numpy()
        counts = [np.bincount(plane, minlength=256) for plane in planes]
        return torch.from_numpy(np.stack(counts) if counts else np.empty((0, 256), np.int64)).view(shape)
    levels = images.flatten(2).long()
    return torch.zeros(shape, dtype=torch.int64, device=images.device).scatter_add_(2, levels, torch.ones_like(levels))


def _on_numpy(images: torch.Tensor) -> bool:
    return images.device.type == "cpu" and not torch.compiler.is_compiling()
