"""RandAugment and TrivialAugmentWide, a policy per sample, on uint8 images.

Operations, ranges and signs are torchvision's. Each sample takes its own operations; the batch still goes through one
pass where they come in the order table → geometry → colour, and only the samples that break the order take another,
together: RandAugment(2) is at most two warps. Sharpened samples pass through that filter besides, taken out and put
back: to copy the whole batch through it took 0.7 ms more, of 9 for 64 images of 224 × 224.

E. D. Cubuk et al., "RandAugment: practical automated data augmentation with a reduced search space", 2020;
S. Müller, F. Hutter, "TrivialAugment: tuning-free yet state-of-the-art data augmentation", ICCV 2021.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.augment import geometry, tables
from imgopt_fast.augment.arguments import Fill, Uniforms, fill_value, integer, interpolation_name
from imgopt_fast.augment.fold import Fold, Rows, Sampling
from imgopt_fast.augment.geometry import Matrix, Size
from imgopt_fast.augment.samples import put, taken
from imgopt_fast.augment.transform import Draw, Transform
from imgopt_fast.ops.photometric import adjust_sharpness

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
_CODE = {name: code for code, name in enumerate(OPERATIONS)}
_GEOMETRIC = np.array([name in ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate") for name in OPERATIONS])
_COLORING = np.array([name in ("Brightness", "Color", "Contrast") for name in OPERATIONS])
_TABULAR = np.array([name in ("Posterize", "Solarize", "AutoContrast", "Equalize") for name in OPERATIONS])
_SIGNED = np.array([name not in ("Identity", *OPERATIONS[10:]) for name in OPERATIONS])


class _Policy(Transform):
    """`steps` operations per sample, each with a magnitude."""

    steps = 1
    decides = True
    labels = MappingProxyType({"operation": OPERATIONS})

    def __init__(self, num_magnitude_bins: int, interpolation: Any, fill: Fill | None) -> None:
        super().__init__()
        self.num_magnitude_bins = integer("num_magnitude_bins", num_magnitude_bins, 2)
        self.sampling = Sampling(interpolation_name(interpolation), "constant", fill_value(fill))

    def matrix(self, draw: Draw, size: Size) -> Matrix:
        steps = [_matrix(draw["operation"][:, k], draw["magnitude"][:, k], size) for k in range(self.steps)]
        return geometry.compose(*steps)

    def record(self, fold: Fold, draw: Draw) -> None:
        if fold.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 for the operations of a policy, got {fold.dtype}")
        for k in range(self.steps):
            self._record_step(fold, draw["operation"][:, k], draw["magnitude"][:, k])

    def _record_step(self, fold: Fold, operation: NDArray[np.int64], magnitude: Uniforms) -> None:
        """Each sample has one operation, so the kinds can be recorded in any order."""
        tabular, sharp = _TABULAR[operation], operation == _CODE["Sharpness"]
        moved, colored = _GEOMETRIC[operation], _COLORING[operation]
        images = fold.settled(tabular | sharp, moved)
        if sharp.any():
            fold.replace(images := _sharpened(fold, images, sharp, magnitude))
        if tabular.any():
            fold.table(_tables(fold, images, operation, magnitude), tabular)
        if moved.any():
            fold.warp(_matrix(operation, magnitude, fold.size), fold.size, self.sampling, moved)
        if colored.any():
            brightness, saturation, contrast = (
                np.where(operation == _CODE[name], 1.0 + magnitude, 1.0) for name in ("Brightness", "Color", "Contrast")
            )
            fold.color(brightness, contrast, saturation, colored)


class RandAugment(_Policy):
    """`num_ops` random operations per sample, all of strength `magnitude` (of `num_magnitude_bins`); uint8 images.

    Args:
        num_ops: at least 1.
        magnitude: 0 to num_magnitude_bins - 1.
        num_magnitude_bins: at least 2.
        interpolation: of the geometric operations, "nearest" (torchvision's default), "bilinear" or "bicubic".
        fill: what they bring in: a number, or one per channel, in levels; None is 0.
    """

    def __init__(
        self,
        num_ops: int = 2,
        magnitude: int = 9,
        num_magnitude_bins: int = 31,
        interpolation: Any = "nearest",
        fill: Fill | None = None,
    ) -> None:
        super().__init__(num_magnitude_bins, interpolation, fill)
        self.steps, self.strength = integer("num_ops", num_ops, 1), integer("magnitude", magnitude, 0)
        if magnitude >= num_magnitude_bins:
            raise ValueError(f"magnitude: expected 0 to {num_magnitude_bins - 1}, got {magnitude}")
        self.words = 2 * num_ops

    def draw(self, u: Uniforms, size: Size) -> Draw:
        fraction = self.strength / (self.num_magnitude_bins - 1)
        limits = _limits(0.3, (150 / 331 * size[1], 150 / 331 * size[0]), 30.0, 0.9)
        operation = (u[: self.steps] * len(OPERATIONS)).astype(np.int64)
        strength = np.full(operation.shape, fraction)
        magnitude = _magnitudes(operation, strength, limits, 8 - np.rint(strength * 4))
        return _drawn(operation, magnitude, u[self.steps :] <= 0.5)

    def extra_repr(self) -> str:
        return f"num_ops={self.steps}, magnitude={self.strength}, num_magnitude_bins={self.num_magnitude_bins}"


class TrivialAugmentWide(_Policy):
    """One random operation of random strength per sample; uint8 images. Arguments as for RandAugment."""

    words = 3

    def __init__(self, num_magnitude_bins: int = 31, interpolation: Any = "nearest", fill: Fill | None = None) -> None:
        super().__init__(num_magnitude_bins, interpolation, fill)

    def draw(self, u: Uniforms, size: Size) -> Draw:
        operation = (u[:1] * len(OPERATIONS)).astype(np.int64)
        fraction = np.floor(u[1:2] * self.num_magnitude_bins) / (self.num_magnitude_bins - 1)
        limits = _limits(0.99, (32.0, 32.0), 135.0, 0.99)
        return _drawn(operation, _magnitudes(operation, fraction, limits, 8 - np.rint(fraction * 6)), u[2:3] <= 0.5)

    def extra_repr(self) -> str:
        return f"num_magnitude_bins={self.num_magnitude_bins}"


# ---------------------------------------------------------------------------------------------------- magnitudes


def _limits(shear: float, translate: tuple[float, float], degrees: float, factor: float) -> Uniforms:
    """The magnitude of each operation at full strength; Posterize and Solarize fall with the strength instead."""
    limits = dict.fromkeys(OPERATIONS, 0.0)
    limits.update(ShearX=shear, ShearY=shear, TranslateX=translate[0], TranslateY=translate[1], Rotate=degrees)
    limits.update(Brightness=factor, Color=factor, Contrast=factor, Sharpness=factor)
    return np.array(list(limits.values()))


def _magnitudes(operation: NDArray[np.int64], fraction: Uniforms, limits: Uniforms, bits: Uniforms) -> Uniforms:
    magnitude = limits[operation] * fraction
    translates = (operation == _CODE["TranslateX"]) | (operation == _CODE["TranslateY"])
    magnitude = np.where(translates, np.trunc(magnitude), magnitude)  # whole pixels
    magnitude = np.where(operation == _CODE["Posterize"], bits, magnitude)
    return np.where(operation == _CODE["Solarize"], 255.0 * (1.0 - fraction), magnitude)


def _drawn(operation: NDArray[np.int64], magnitude: Uniforms, negative: Rows) -> Draw:
    signed = np.where(negative & _SIGNED[operation], -magnitude, magnitude)
    return {"operation": operation.T, "magnitude": signed.T}


# ---------------------------------------------------------------------------------------------------- work


def _matrix(operation: NDArray[np.int64], magnitude: Uniforms, size: Size) -> Matrix:
    """(N, 2, 3): the identity for what is not geometric. Shears hold the upper left corner in place."""

    def where(name: str, value: Uniforms) -> Uniforms:
        return np.where(operation == _CODE[name], value, 0.0)

    shear = np.degrees(np.arctan(magnitude))
    shears = (operation == _CODE["ShearX"]) | (operation == _CODE["ShearY"])
    center = np.where(shears, -0.5, (size[1] - 1) / 2), np.where(shears, -0.5, (size[0] - 1) / 2)
    return geometry.rotate_scale_shear(
        where("Rotate", -magnitude),
        1.0,
        (where("ShearX", shear), where("ShearY", shear)),
        center,
        (where("TranslateX", magnitude), where("TranslateY", magnitude)),
    )


def _tables(fold: Fold, images: torch.Tensor, operation: NDArray[np.int64], magnitude: Uniforms) -> torch.Tensor:
    """(N, C, 256) on the device of `images`: the identity for what has no table."""
    table = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(fold), 256)).copy()
    posterized, solarized = operation == _CODE["Posterize"], operation == _CODE["Solarize"]
    table[posterized] = tables.posterize(magnitude[posterized].astype(np.int64))
    table[solarized] = tables.solarize(magnitude[solarized])
    result = torch.from_numpy(table).to(fold.device, non_blocking=True)[:, None].repeat(1, fold.channels, 1)
    for name, measured in (("AutoContrast", tables.autocontrast), ("Equalize", tables.equalize)):
        if (chosen := operation == _CODE[name]).any():
            index = torch.from_numpy(np.flatnonzero(chosen)).to(fold.device, non_blocking=True)
            result.index_copy_(0, index, measured(taken(images, index)))
    return result


def _sharpened(fold: Fold, images: torch.Tensor, rows: Rows, magnitude: Uniforms) -> torch.Tensor:
    chosen = np.flatnonzero(rows)
    index = torch.from_numpy(chosen).to(fold.device, non_blocking=True)
    sharpened = adjust_sharpness(taken(images, index), torch.from_numpy(1.0 + magnitude[chosen]))
    return put(images if fold.owned else images.clone(), index, sharpened)
