"""Images, maps and layouts for the tests of affine_warp, and what a warp must come to: the reference in float64."""

from typing import Any

import numpy as np
import torch

from imgopt_fast.ops.affine_warp import reference

op = torch.ops.imgopt_fast.affine_warp.default
backward_op = torch.ops.imgopt_fast.affine_warp_backward.default
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def oracle(images: torch.Tensor, matrix: torch.Tensor, **options: Any) -> torch.Tensor:
    """The reference called directly, in float64 units of the output; uint8 output stays a level before rounding."""
    options = {"size": images.shape[2:], "interpolation": "bilinear", "padding_mode": "constant", "fill": 0.0} | options
    channels = images.shape[1]
    fill = options["fill"]
    fill = [fill] * channels if isinstance(fill, (int, float)) else list(fill)
    mean, std = (options.get(k) or [] for k in ("mean", "std"))
    return reference.affine_warp(
        images, matrix, list(options["size"]), options["interpolation"], options["padding_mode"], fill,
        options.get("antialias", False), options.get("table"), options.get("color_matrix"), mean, std,
        torch.float64, torch.contiguous_format,
    )  # fmt: skip


def random_images(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    levels = torch.randint(0, 256, shape, dtype=torch.uint8)
    return levels if dtype == torch.uint8 else (levels.double() / 255).to(dtype)


def rotation(n: int, height: int, width: int, degrees: float = 30, scale: float = 1.1) -> torch.Tensor:
    """Rotation and scale about the centre, a little different for every image."""
    result = []
    for i in range(n):
        angle, s = np.deg2rad(degrees + 17 * i), scale + 0.1 * i
        c, d = np.cos(angle) / s, np.sin(angle) / s
        x, y = (width - 1) / 2, (height - 1) / 2
        result.append([[c, d, x - c * x - d * y + 0.3], [-d, c, y + d * x - c * y - 0.2]])
    return torch.tensor(result, dtype=torch.float64).reshape(n, 2, 3)


def homography(n: int, height: int, width: int) -> torch.Tensor:
    last = torch.tensor([[0.3 / width, -0.2 / height, 1.05]], dtype=torch.float64).expand(n, 1, 3)
    return torch.cat([rotation(n, height, width), last], 1)


def layout(images: torch.Tensor, name: str) -> torch.Tensor:
    """The same pixels behind other strides."""
    if name == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if name == "strided":
        n, c, h, w = images.shape
        wide = images.new_zeros((n, c + 1, h + 2, 2 * w + 1))
        view = wide[:, 1:, 1 : h + 1, 1 : 2 * w + 1 : 2]
        return view.copy_(images)
    return images.contiguous()


# 1/255 · (0.02 levels), and the rounding of the output to its dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4.1e-3, torch.float16: 6e-4, torch.uint8: 0}


def check(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """`expected` in float64 units of [0, 1]; uint8 may differ only where the exact level is within 0.02 of a tie."""
    assert actual.shape == expected.shape
    if actual.dtype == torch.uint8:
        levels = (expected * 255).clamp(0, 255)
        off = (actual.double() - levels).abs()
        assert (off <= 0.5 + 0.02).all(), off.max()
    else:
        torch.testing.assert_close(
            actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=scale * TOLERANCE[actual.dtype]
        )
