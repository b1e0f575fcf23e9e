"""Flips, rotations, crops, resizes and perspective: transforms that come down to one matrix per sample.

Names, arguments, parameter distributions and signs are torchvision's (transforms.v2); every sample has its own draw.
Two differences, both because coordinates are exact here: a perspective takes corner pixels' centres to the drawn
points, and crops and resizes next to other geometry read the true neighbours of the crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.augment import geometry
from imgopt_fast.augment.fold import Sampling
from imgopt_fast.augment.geometry import Matrix, Size
from imgopt_fast.augment.transform import Draw, Geometric
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES

Uniforms = NDArray[np.float64]
Fill = float | Sequence[float]

CROP_ATTEMPTS = 10  # torchvision's number of trials for a crop that fits


class RandomHorizontalFlip(Geometric):
    """Mirrors left and right with probability `p`."""

    words = 1
    flips = True

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = probability(p)

    def draw(self, u: Uniforms, size: Size) -> Draw:
        return {"flip": u[0] < self.p}

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        flip = draw["flip"].astype(np.float64)
        return geometry.affine(1.0 - 2.0 * flip, 0.0, flip * (size[1] - 1), 0.0, 1.0, 0.0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirrors top and bottom with probability `p`."""

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        flip = draw["flip"].astype(np.float64)
        return geometry.affine(1.0, 0.0, 0.0, 0.0, 1.0 - 2.0 * flip, flip * (size[0] - 1))


class RandomAffine(Geometric):
    """Rotates, moves, scales and shears about the centre.

    Args:
        degrees: the angle is uniform in (-degrees, degrees), or in the given (low, high); clockwise.
        translate: (a, b): moves by up to a·W to either side and b·H up or down, whole pixels.
        scale: (low, high) of the factor.
        shear: s for (-s, s) along x; (low, high) along x; or (low, high, low, high) along x and y; degrees.
        interpolation: "nearest" (torchvision's default), "bilinear" or "bicubic".
        fill: what lies outside the image: a number, or one per channel, in the images' units.
        center: (x, y) in pixels from the upper left corner of the image; its middle by default.
    """

    words = 6

    def __init__(
        self,
        degrees: float | Sequence[float],
        translate: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        shear: float | Sequence[float] | None = None,
        interpolation: Any = "nearest",
        fill: Fill = 0.0,
        center: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.degrees = symmetric("degrees", degrees)
        self.translate = None if translate is None else pair("translate", translate)
        if self.translate and not all(0 <= t <= 1 for t in self.translate):
            raise ValueError(f"translate: expected fractions in [0, 1], got {translate}")
        self.scale = None if scale is None else interval("scale", scale)
        if self.scale and self.scale[0] <= 0:
            raise ValueError(f"scale: expected positive factors, got {scale}")
        self.shear = _shears(shear)
        self.center = None if center is None else pair("center", center)
        self.sampling = Sampling(interpolation_name(interpolation), "constant", fill_value(fill))

    def draw(self, u: Uniforms, size: Size) -> Draw:
        draw: Draw = {"angle": between(u[0], self.degrees)}
        if self.translate is not None:
            reach = self.translate[0] * size[1], self.translate[1] * size[0]
            draw["translate"] = np.stack([np.rint((2.0 * u[i + 1] - 1.0) * r) for i, r in enumerate(reach)], axis=1)
        if self.scale is not None:
            draw["scale"] = between(u[3], self.scale)
        if self.shear is not None:
            draw["shear"] = np.stack([between(u[4 + i], s) for i, s in enumerate(self.shear)], axis=1)
        return draw

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        translate, shear = draw.get("translate"), draw.get("shear")
        return geometry.from_torchvision(
            size,
            angle=draw["angle"],
            translate=(0.0, 0.0) if translate is None else (translate[:, 0], translate[:, 1]),
            scale=draw.get("scale", _ONE),
            shear=(0.0, 0.0) if shear is None else (shear[:, 0], shear[:, 1]),
            center=self.center,
        )

    def extra_repr(self) -> str:
        return f"degrees={self.degrees}, translate={self.translate}, scale={self.scale}, shear={self.shear}"


class RandomRotation(Geometric):
    """Turns by an angle uniform in (-degrees, degrees), or in the given (low, high); counter-clockwise.

    With `expand` the output is large enough for every angle of the range, so that all samples share one size (and
    `center` must not be given). The other arguments are those of RandomAffine.
    """

    words = 1

    def __init__(
        self,
        degrees: float | Sequence[float],
        interpolation: Any = "nearest",
        expand: bool = False,
        center: Sequence[float] | None = None,
        fill: Fill = 0.0,
    ) -> None:
        super().__init__()
        self.degrees = symmetric("degrees", degrees)
        if expand and center is not None:
            raise ValueError("expand, center: expected at most one of the two")
        self.expand = expand
        self.center = None if center is None else pair("center", center)
        self.sampling = Sampling(interpolation_name(interpolation), "constant", fill_value(fill))

    def draw(self, u: Uniforms, size: Size) -> Draw:
        return {"angle": between(u[0], self.degrees)}

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        turned = geometry.from_torchvision(size, angle=-draw["angle"], center=self.center)
        if not self.expand:
            return turned
        height, width = self.output_size(size)
        return geometry.compose(turned, geometry.translation((width - size[1]) / 2, (height - size[0]) / 2))

    def output_size(self, size: Size) -> Size:
        if not self.expand:
            return size
        low, high = (math.radians(d) for d in self.degrees)
        height, width = size
        # The extent |w·cos| + |h·sin| is largest at an end of the range or where the diagonal lies along the axis.
        quarter = math.pi / 2
        peaks = [math.atan2(height, width), math.atan2(width, height)]
        turns = range(math.floor(low / quarter) - 1, math.ceil(high / quarter) + 1)
        angles = [low, high, *(a for p in peaks for k in turns if low <= (a := p + k * quarter) <= high)]
        extents = [(abs(math.cos(a)), abs(math.sin(a))) for a in angles]
        return (
            math.ceil(max(height * c + width * s for c, s in extents) - 1e-6),
            math.ceil(max(width * c + height * s for c, s in extents) - 1e-6),
        )

    def extra_repr(self) -> str:
        return f"degrees={self.degrees}, expand={self.expand}"


class RandomPerspective(Geometric):
    """With probability `p`, moves each corner inwards by up to `distortion_scale` of half the image."""

    words = 9

    def __init__(
        self, distortion_scale: float = 0.5, p: float = 0.5, interpolation: Any = "bilinear", fill: Fill = 0.0
    ) -> None:
        super().__init__()
        self.distortion_scale = probability(distortion_scale, "distortion_scale")
        self.p = probability(p)
        self.sampling = Sampling(interpolation_name(interpolation), "constant", fill_value(fill))

    def draw(self, u: Uniforms, size: Size) -> Draw:
        height, width = size
        reach_x, reach_y = (int(self.distortion_scale * (n // 2)) + 1 for n in (width, height))
        x, y = np.floor(u[1:5] * reach_x), np.floor(u[5:9] * reach_y)
        right, bottom = width - 1 - x, height - 1 - y
        corners = [(x[0], y[0]), (right[1], y[1]), (right[2], bottom[2]), (x[3], bottom[3])]
        moved = np.stack([np.stack(corner, axis=1) for corner in corners], axis=1)
        return {"corners": np.where((u[0] < self.p)[:, None, None], moved, _corners(size))}

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        return geometry.homography(_corners(size), draw["corners"])

    def extra_repr(self) -> str:
        return f"distortion_scale={self.distortion_scale}, p={self.p}"


class RandomCrop(Geometric):
    """Cuts `size` (H, W), or a square, out at a random place.

    Args:
        size: of the crop.
        padding: pixels added before: one number, (left and right, top and bottom) or (left, top, right, bottom).
        pad_if_needed: also add what a smaller image lacks, on both sides; otherwise it is an error.
        fill: of the padding, in the images' units.
        padding_mode: "constant", "edge", "reflect" or "symmetric".
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
        shorter = size if isinstance(size, int) else size[0] if size is not None and len(size) == 1 else None
        if max_size is not None and size is not None and shorter is None:
            raise ValueError(f"max_size: expected size to be one number with it, got {size}")
        if max_size is not None and shorter is not None and max_size <= shorter:
            raise ValueError(f"max_size: expected more than size, {shorter}, got {max_size}")
        self.shorter, self.max_size = shorter, max_size
        self.size = None if size is None or shorter is not None else height_width(size)
        self.sampling = Sampling(interpolation_name(interpolation), None, 0.0, bool(antialias))

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        return geometry.resized_crop(0.0, 0.0, float(size[0]), float(size[1]), self.output_size(size))[None]

    def output_size(self, size: Size) -> Size:
        if self.size is not None:
            return self.size
        short, long = sorted(size)
        if self.shorter is None:
            assert self.max_size is not None
            new_long, new_short = self.max_size, int(self.max_size * short / long)
        else:
            new_short, new_long = self.shorter, int(self.shorter * long / short)
            if self.max_size is not None and new_long > self.max_size:
                new_short, new_long = int(self.max_size * new_short / new_long), self.max_size
        return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)

    def extra_repr(self) -> str:
        return f"size={self.size or self.shorter}, max_size={self.max_size}, antialias={self.sampling.antialias}"


# ---------------------------------------------------------------------------------------------------- distributions

_ONE = np.ones(1)


def between(u: Uniforms, bounds: tuple[float, float]) -> Uniforms:
    low, high = bounds
    return low + u * (high - low)


def trial_sides(
    u_area: Uniforms, u_aspect: Uniforms, size: Size, scale: tuple[float, float], log_ratio: tuple[float, float]
) -> tuple[Uniforms, Uniforms]:
    """Sides (a, b) of random rectangles with uniform area and log-uniform a / b, whole pixels; they may not fit."""
    area = between(u_area, scale) * (size[0] * size[1])
    ratio = np.exp(between(u_aspect, log_ratio))
    return np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))


def _corners(size: Size) -> Uniforms:
    right, bottom = size[1] - 1.0, size[0] - 1.0
    return np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])


# ---------------------------------------------------------------------------------------------------- arguments


def probability(p: float, name: str = "p") -> float:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {p}")
    return float(p)


def pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ValueError(f"{name}: expected two numbers, got {values!r}")
    return float(values[0]), float(values[1])


def interval(name: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = pair(name, values)
    if not low <= high:
        raise ValueError(f"{name}: expected (low, high), got {values!r}")
    return low, high


def symmetric(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """A number d stands for (-d, d)."""
    if isinstance(value, (int, float)):
        if value < 0:
            raise ValueError(f"{name}: a single number must not be negative, got {value}")
        return -float(value), float(value)
    return interval(name, value)


def height_width(size: int | Sequence[int]) -> Size:
    values = (size, size) if isinstance(size, int) else tuple(size) * (2 if len(size) == 1 else 1)
    if len(values) != 2 or not all(int(v) == v and v > 0 for v in values):
        raise ValueError(f"size: expected a positive integer or (height, width), got {size!r}")
    return int(values[0]), int(values[1])


def interpolation_name(interpolation: Any) -> str:
    """A name, or a member of torchvision's InterpolationMode."""
    name = getattr(interpolation, "value", interpolation)
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    return str(name)


def fill_value(fill: Fill | None) -> float | tuple[float, ...]:
    if fill is None:
        return 0.0
    return float(fill) if isinstance(fill, (int, float)) else tuple(float(f) for f in fill)


def _shears(shear: float | Sequence[float] | None) -> tuple[tuple[float, float], ...] | None:
    if shear is None:
        return None
    if isinstance(shear, (int, float)) or len(shear) == 2:
        return symmetric("shear", shear), (0.0, 0.0)
    if len(shear) != 4:
        raise ValueError(f"shear: expected a number, two or four of them, got {shear!r}")
    return interval("shear", shear[:2]), interval("shear", shear[2:])


def _sides(padding: int | Sequence[int] | None) -> tuple[int, int, int, int]:
    """(left, top, right, bottom)"""
    values = (0,) if padding is None else (padding,) if isinstance(padding, int) else tuple(padding)
    if len(values) not in (1, 2, 4) or min(values) < 0:
        raise ValueError(f"padding: expected one, two or four numbers that are not negative, got {padding!r}")
    if len(values) == 4:
        left, top, right, bottom = values
        return left, top, right, bottom
    return values[0], values[-1], values[0], values[-1]
