"""Crops and resizes: transforms that choose a part of the image, and the size that it comes out with.

Names, arguments and parameter distributions are torchvision's (transforms.v2); every sample has its own draw. One
difference, because crops and resizes fold into one sampling: next to other geometry they read the true neighbours of
the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from imgopt_fast.augment import geometry
from imgopt_fast.augment.arguments import (
    CROP_ATTEMPTS,
    Fill,
    Uniforms,
    fill_value,
    height_width,
    integer,
    interpolation_name,
    interval,
    trial_sides,
)
from imgopt_fast.augment.fold import Sampling
from imgopt_fast.augment.geometry import Matrix, Size
from imgopt_fast.augment.transform import Draw, Geometric
from imgopt_fast.ops.affine_warp import PADDING_MODES


class RandomCrop(Geometric):
    """Cuts `size` (H, W), or a square, out at a random place.

    Args:
        size: of the crop.
        padding: pixels added before: one number, (left and right, top and bottom) or (left, top, right, bottom).
        pad_if_needed: also add what a smaller image lacks, on both sides; otherwise it is an error.
        fill: of the padding, a number or one per channel, in the images' units.
        padding_mode: "constant", "edge", "reflect" or "symmetric".

    A call raises ValueError where the crop is larger than the padded images and `pad_if_needed` is false.
    """

    words = 2

    def __init__(
        self,
        size: int | Sequence[int],
        padding: int | Sequence[int] | None = None,
        pad_if_needed: bool = False,
        fill: Fill = 0.0,
        padding_mode: str = "constant",
    ) -> None:
        super().__init__()
        self.size = height_width(size)
        self.padding = _sides(padding)
        self.pad_if_needed = pad_if_needed
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        pads = pad_if_needed or any(self.padding)
        self.sampling = Sampling(None, padding_mode if pads else None, fill_value(fill))

    def draw(self, u: Uniforms, size: Size) -> Draw:
        left, top, right, bottom = self.padding
        height, width = size[0] + top + bottom, size[1] + left + right
        crop_height, crop_width = self.size
        more_y, more_x = max(crop_height - height, 0), max(crop_width - width, 0)
        if (more_y or more_x) and not self.pad_if_needed:
            raise ValueError(f"size: the crop {self.size} is larger than the padded image {(height, width)}")
        rows, columns = height + 2 * more_y - crop_height + 1, width + 2 * more_x - crop_width + 1
        return {
            "top": np.floor(u[0] * rows) - (top + more_y),
            "left": np.floor(u[1] * columns) - (left + more_x),
        }

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        return geometry.translation(-draw["left"], -draw["top"])

    def output_size(self, size: Size) -> Size:
        return self.size

    def extra_repr(self) -> str:
        return f"size={self.size}, padding={self.padding}, padding_mode={self.sampling.padding_mode}"


class RandomResizedCrop(Geometric):
    """Cuts out a random part and resizes it to `size`.

    Args:
        size: (H, W) of the result, or a square's side.
        scale: (low, high) of the part's area, as a fraction of the image.
        ratio: (low, high) of width / height, log-uniform.
        interpolation: "nearest", "bilinear" or "bicubic".
        antialias: average first where the part is larger than the result (see `affine_warp`).

    C. Szegedy et al., "Going deeper with convolutions", CVPR 2015; distributions and ten attempts as torchvision.
    """

    words = 2 * CROP_ATTEMPTS + 2

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3.0 / 4.0, 4.0 / 3.0),
        interpolation: Any = "bilinear",
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.size = height_width(size)
        self.scale = interval("scale", scale)
        self.ratio = interval("ratio", ratio)
        if self.scale[0] < 0 or self.ratio[0] <= 0:
            raise ValueError(f"scale, ratio: expected positive intervals, got {scale} and {ratio}")
        self.sampling = Sampling(interpolation_name(interpolation), None, 0.0, bool(antialias))

    def draw(self, u: Uniforms, size: Size) -> Draw:
        height, width = size
        aspect = math.log(self.ratio[0]), math.log(self.ratio[1])
        trial = u[: 2 * CROP_ATTEMPTS]
        w, h = trial_sides(trial[0::2], trial[1::2], size, self.scale, aspect)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.argmax(axis=0)
        sample = np.arange(fits.shape[1])
        found = fits[first, sample]
        central = self._central(size)
        h, w = np.where(found, h[first, sample], central[0]), np.where(found, w[first, sample], central[1])
        spare_y, spare_x = height - h, width - w
        top, left = u[-2] * (spare_y + 1), u[-1] * (spare_x + 1)
        return {
            "top": np.where(found, np.floor(top), np.floor(spare_y / 2)),
            "left": np.where(found, np.floor(left), np.floor(spare_x / 2)),
            "height": h,
            "width": w,
        }

    def _central(self, size: Size) -> tuple[float, float]:
        """The largest part within the range of ratios, taken where no trial fits."""
        height, width = size
        low, high = self.ratio
        if width / height < low:
            return float(min(height, round(width / low))), float(width)
        if width / height > high:
            return float(height), float(min(width, round(height * high)))
        return float(height), float(width)

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        return geometry.resized_crop(draw["top"], draw["left"], draw["height"], draw["width"], self.size)

    def output_size(self, size: Size) -> Size:
        return self.size

    def extra_repr(self) -> str:
        return f"size={self.size}, scale={self.scale}, ratio={self.ratio}, antialias={self.sampling.antialias}"


class CenterCrop(Geometric):
    """Cuts `size` (H, W), or a square, out of the middle; what a smaller image lacks is zero."""

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = height_width(size)
        self.sampling = Sampling(None, "constant", 0.0)

    def record(self, fold: Any, draw: Draw) -> None:
        inside = self.size[0] <= fold.size[0] and self.size[1] <= fold.size[1]
        sampling = Sampling() if inside else self.sampling
        fold.warp(self.matrix(draw, fold.size), self.size, sampling)

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        # round() halves to even, as torchvision; a smaller image is padded by the floor of half the difference
        top, left = (round((n - c) / 2.0) if n >= c else -((c - n) // 2) for n, c in zip(size, self.size, strict=True))
        return geometry.translation(-float(left), -float(top))[None]

    def output_size(self, size: Size) -> Size:
        return self.size

    def extra_repr(self) -> str:
        return f"size={self.size}"


class Resize(Geometric):
    """Resizes to (H, W), or the shorter side to one number (the longer one to at most `max_size`).

    `interpolation` and `antialias` as in RandomResizedCrop.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None,
        interpolation: Any = "bilinear",
        max_size: int | None = None,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        if size is None and max_size is None:
            raise ValueError("size, max_size: expected at least one of the two")
        sides = None if size is None else height_width(size)
        one = sides is not None and not (isinstance(size, Sequence) and len(size) == 2)
        shorter = sides[0] if sides is not None and one else None
        if max_size is not None:
            integer("max_size", max_size, 1)
        if max_size is not None and sides is not None and not one:
            raise ValueError(f"max_size: expected size to be one number with it, got {size}")
        if max_size is not None and shorter is not None and max_size <= shorter:
            raise ValueError(f"max_size: expected more than size, {shorter}, got {max_size}")
        self.shorter, self.max_size = shorter, max_size
        self.size = None if one else sides
        self.sampling = Sampling(interpolation_name(interpolation), None, 0.0, bool(antialias))

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        return geometry.resized_crop(0.0, 0.0, float(size[0]), float(size[1]), self.output_size(size))[None]

    def output_size(self, size: Size) -> Size:
        if self.size is not None:
            return self.size
        short, long = sorted(size)
        if self.shorter is None:
            assert self.max_size is not None
            new_long, new_short = self.max_size, max(1, int(self.max_size * short / long))
        else:
            new_short, new_long = self.shorter, int(self.shorter * long / short)
            if self.max_size is not None and new_long > self.max_size:
                new_short, new_long = max(1, int(self.max_size * new_short / new_long)), self.max_size
        return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)

    def extra_repr(self) -> str:
        return f"size={self.size or self.shorter}, max_size={self.max_size}, antialias={self.sampling.antialias}"


# ---------------------------------------------------------------------------------------------------- details


def _sides(padding: int | Sequence[int] | None) -> tuple[int, int, int, int]:
    """(left, top, right, bottom)"""
    values = (0,) if padding is None else (padding,) if isinstance(padding, int) else tuple(padding)
    if len(values) not in (1, 2, 4) or min(values) < 0:
        raise ValueError(f"padding: expected one, two or four numbers that are not negative, got {padding!r}")
    if len(values) == 4:
        left, top, right, bottom = values
        return left, top, right, bottom
    return values[0], values[-1], values[0], values[-1]
