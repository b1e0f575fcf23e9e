"""What some transforms have to know of the images before they can act: mean colours and histograms.

They are measured on the images' device, without a synchronisation. For the mean of 64 uint8 images of 3 x 224 x 224 one
thread takes 0.2 ms (NumPy 1.0, torch, which widens every pixel in memory, 23), for their histograms 2.7 (17, 63).
"""

import numpy as np
import torch

from imgopt_fast.ops.photometric import channel_sums, level_histogram

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601; they sum to one, so grey stays grey


def luma_weights(channels: int) -> tuple[float, ...]:
    """How much each channel weighs in the grey: BT.601 for three, equal for any other number."""
    return LUMA if channels == 3 else (1.0 / channels,) * channels


def mean_gray(images: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
    """(N,) float64: the mean grey in units of [0, 1]; of uint8 images after the table if there is one."""
    _, channels, height, width = images.shape
    weights = np.array(luma_weights(channels))
    if images.dtype != torch.uint8:
        sums = images.mean(dim=(2, 3), dtype=torch.float64)
    elif table is None:
        sums, weights = channel_sums(images), weights / (255 * height * width)
    else:
        sums, weights = (level_histogram(images) * table.to(torch.float64)).sum(2), weights / (255 * height * width)
    # Not a matrix product: its rounding may depend on how many samples there are.
    if sums.device.type == "cpu" and not (torch.compiler.is_compiling() or sums.requires_grad):
        return torch.from_numpy((sums.numpy() * weights).sum(axis=1))  # a third of the time, for few numbers
    return (sums * torch.from_numpy(weights).to(images.device, non_blocking=True)).sum(1)
