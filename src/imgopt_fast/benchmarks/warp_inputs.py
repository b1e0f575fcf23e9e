"""Images and matrices that the warps and the augmentation pipelines are measured with."""

import math

import torch
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Sixteen bilinear RGB pixels from uint8 take 66 vector instructions, 17 cycles on a core that issues four in each. In
# 17 cycles it does 34 fused multiply-adds of 16 lanes, so that a pixel costs the time of 68 flop at the FMA rate.
BILINEAR_FLOPS = 68


def photographs(batch: int, channels: int, side: int) -> torch.Tensor:
    """Smooth uint8 images with a little noise, channels_last."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, channels, max(2, side // 8), max(2, side // 8), generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=True) * 240
    noise = torch.rand(batch, channels, side, side, generator=generator) * 15
    return (smooth + noise).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def draw_matrices(batch: int, side: int, perspective: bool) -> torch.Tensor:
    """Output-to-input matrices: rotation of up to 30 degrees about the centre, scale 0.8 to 1.2."""
    generator = torch.Generator().manual_seed(2)
    angle = (torch.rand(batch, generator=generator, dtype=torch.float64) * 2 - 1) * math.pi / 6
    scale = 1 / (0.8 + 0.4 * torch.rand(batch, generator=generator, dtype=torch.float64))
    cos, sin, centre = scale * angle.cos(), scale * angle.sin(), (side - 1) / 2
    rows = [cos, -sin, centre - cos * centre + sin * centre, sin, cos, centre - sin * centre - cos * centre]
    matrix = torch.stack(rows, dim=1).view(batch, 2, 3)
    if perspective:
        tilt = (torch.rand(batch, 1, 2, generator=generator, dtype=torch.float64) * 2 - 1) * 0.2 / side
        matrix = torch.cat([matrix, torch.cat([tilt, torch.ones(batch, 1, 1, dtype=torch.float64)], dim=2)], dim=1)
    return matrix.float()


def affine_grid_theta(matrix: torch.Tensor, side: int, *, aligned: bool = True) -> torch.Tensor:
    """`matrix`, which maps pixels to pixels, in the units of affine_grid, where the image spans [-1, 1]."""
    half = (side - 1) / 2 if aligned else side / 2  # pixels per unit; the centre is at (side - 1) / 2 in both
    centre = (side - 1) / 2
    to_pixels = torch.tensor([[half, 0, centre], [0, half, centre], [0, 0, 1]], dtype=torch.float64)
    full = torch.cat([matrix.double(), torch.tensor([[[0.0, 0.0, 1.0]]]).double().expand(len(matrix), 1, 3)], dim=1)
    theta: torch.Tensor = torch.linalg.inv(to_pixels) @ full @ to_pixels
    return theta[:, :2].float()
