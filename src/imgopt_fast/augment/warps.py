"""Flips, rotations, affine and perspective maps: transforms that move the pixels of an image within its frame.

Names, arguments, parameter distributions and signs are torchvision's (transforms.v2); every sample has its own draw.
One difference, because coordinates are exact here: a perspective takes corner pixels' centres to the drawn points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from imgopt_fast.augment import geometry
from imgopt_fast.augment.arguments import (
    Fill,
    Uniforms,
    between,
    fill_value,
    interpolation_name,
    interval,
    pair,
    probability,
    symmetric,
)
from imgopt_fast.augment.fold import Sampling
from imgopt_fast.augment.geometry import Matrix, Size
from imgopt_fast.augment.transform import Draw, Geometric


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
            translate=None if translate is None else (translate[:, 0], translate[:, 1]),
            scale=draw.get("scale", 1.0),
            shear=None if shear is None else (shear[:, 0], shear[:, 1]),
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
    """With probability `p`, moves each corner inwards by up to `distortion_scale` of half the image, whole pixels.

    An image three of whose corners would come to lie on one line, where no map leads, stays as it is, and so do images
    of one row or column.

    Args:
        distortion_scale: in [0, 1].
        p: in [0, 1].
        interpolation: "nearest", "bilinear" (the default, as torchvision's) or "bicubic".
        fill: what lies outside the image: a number, or one per channel, in the images' units.
    """

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
        moves = (u[0] < self.p) & geometry.no_three_on_a_line(moved)
        return {"corners": np.where(moves[:, None, None], moved, _corners(size))}

    def matrix(self, draw: Draw, size: Size) -> Matrix | None:
        return None if min(size) < 2 else geometry.homography(_corners(size), draw["corners"])

    def extra_repr(self) -> str:
        return f"distortion_scale={self.distortion_scale}, p={self.p}"


# ---------------------------------------------------------------------------------------------------- details


def _shears(shear: float | Sequence[float] | None) -> tuple[tuple[float, float], ...] | None:
    if shear is None:
        return None
    if isinstance(shear, (int, float)) or len(shear) == 2:
        return symmetric("shear", shear), (0.0, 0.0)
    if len(shear) != 4:
        raise ValueError(f"shear: expected a number, two or four of them, got {shear!r}")
    return interval("shear", shear[:2]), interval("shear", shear[2:])


def _corners(size: Size) -> Uniforms:
    right, bottom = size[1] - 1.0, size[0] - 1.0
    return np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])
