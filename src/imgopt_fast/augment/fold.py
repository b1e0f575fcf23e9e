"""Folds what the transforms of a pipeline ask for into as few passes over memory as its meaning allows.

One call of `affine_warp` does, in this order: look source pixels up in a table, sample at mapped coordinates, apply a
linear colour map, clamp, normalise, cast. Transforms are recorded, not run; as long as they come in that order they
join the pending call. Its meaning is one sampling, without intermediate clipping or rounding: a rotation after a crop
sees the pixels that the crop cut off, and two resamplings blur once.

What commutes is not held to the order: a linear colour map may precede any geometry that invents no pixels, because
the weights of a sample sum to one (with a constant border the fill colour would be coloured too, so that starts a new
call).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.augment import geometry
from imgopt_fast.augment.geometry import Matrix, Size
from imgopt_fast.augment.samples import put, taken
from imgopt_fast.augment.statistics import luma_weights, mean_gray
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, affine_warp
from imgopt_fast.ops.photometric import apply_table

Floats = NDArray[np.float64]
Rows = NDArray[np.bool_]
Touched = Rows | bool  # the samples that something concerns: a mask, or all (True) or none (False) of them


class Sampling(NamedTuple):
    """How a geometric transform reads its source; None where it does not matter."""

    interpolation: str | None = None  # None: every output pixel falls on an input pixel
    padding_mode: str | None = None  # None: never looks outside by more than half a pixel
    fill: float | tuple[float, ...] = 0.0
    antialias: bool = False

    def join(self, other: Sampling) -> Sampling | None:
        """The sampling that serves both in one call: the finer interpolation; None where the borders disagree."""
        if self.padding_mode is None or other.padding_mode is None:
            border = other if self.padding_mode is None else self
        elif self.padding_mode == other.padding_mode and (self.padding_mode != "constant" or self.fill == other.fill):
            border = self
        else:
            return None
        names = [s.interpolation for s in (self, other) if s.interpolation is not None]
        finest = max(names, key=INTERPOLATIONS.index) if names else None
        return Sampling(finest, border.padding_mode, border.fill, self.antialias or other.antialias)


class Color(NamedTuple):
    """x ↦ own·x + gray·(its grey) + mean·(mean grey of the source): three numbers per sample, (N,) each.

    One such map after another is one again, because grey is linear and the grey of a grey is itself.
    """

    own: Floats
    gray: Floats
    mean: Floats | None  # None until a contrast needs the mean


class Fold:
    """The images of a batch, and the work on them that is still pending."""

    def __init__(self, images: torch.Tensor) -> None:
        self._images = images
        self.channels = images.shape[1]
        self.size: Size = (images.shape[2], images.shape[3])  # after the pending geometry
        self.owned = False  # whether the current images are this object's own, free to be written to
        self._start()

    def _start(self) -> None:
        self._table: torch.Tensor | None = None
        self._matrix: Matrix | None = None
        self._sampling = Sampling()
        self._color: Color | None = None
        self._tabled: Touched = False  # which samples the pending table, geometry or colour touches
        self._warped: Touched = False  # flips left out: an earlier stage may still be done before them
        self._colored: Touched = False

    @property
    def dtype(self) -> torch.dtype:
        return self._images.dtype

    @property
    def device(self) -> torch.device:
        return self._images.device

    def __len__(self) -> int:
        return self._images.shape[0]

    # ------------------------------------------------------------------------------------------ recording

    def warp(
        self, matrix: Matrix, size: Size, sampling: Sampling, rows: Touched = True, *, flips: bool = False
    ) -> None:
        """Resample by `matrix` (N or 1, 2 or 3, 3) to `size`; `rows` says which samples it changes (all by default).

        Tables, histograms and the smoothing filter do not care for what only `flips` the image, so they may precede it.
        """
        if self._color is not None and sampling.padding_mode == "constant":
            self._settle(self._colored & rows)
        joined = sampling if self._matrix is None else self._sampling.join(sampling)
        if joined is None:
            self.images()
            joined = sampling
        self._sampling = joined
        self._matrix = matrix if self._matrix is None else _composed(self._matrix, matrix)
        if not flips:
            self._warped = self._warped | rows
        self.size = size

    def color(
        self,
        brightness: Floats | None = None,
        contrast: Floats | None = None,
        saturation: Floats | None = None,
        rows: Touched = True,
    ) -> None:
        """Scale about black, about the mean grey of the source, and about each pixel's own grey: factors, (N,) each."""
        step = _jitter(brightness, contrast, saturation)
        self._color = step if self._color is None else _after(self._color, step)
        self._colored = self._colored | rows

    def table(self, table: torch.Tensor, rows: Touched = True) -> None:
        """Replace pixels by table (N or 1, C, 256) uint8."""
        if self.dtype != torch.uint8:
            raise TypeError(f"images: expected uint8 before a lookup table, got {self.dtype}; normalise afterwards")
        self._settle((self._warped | self._colored) & rows)
        count = max(len(table), 1 if self._table is None else len(self._table))
        if self._table is not None:
            table = table.expand(count, -1, -1).gather(2, self._table.expand(count, -1, -1).long())
        self._table = table
        self._tabled = self._tabled | rows

    def normalize(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> None:
        """Do the pending work with normalisation and cast; later work starts from there."""
        self._images, self.owned = self._run(mean=mean, std=std, dtype=dtype), True
        self._start()

    def images(self) -> torch.Tensor:
        """Do the pending work and return its result."""
        if not (self._table is None and self._matrix is None and self._color is None):
            self._images, self.owned = self._run(), True
            self._start()
        return self._images

    def replace(self, images: torch.Tensor) -> None:
        """Go on from `images`, which were made from the result of `images()`."""
        self._images, self.owned = images, True

    def settled(self, rows: Rows, filled: Rows) -> torch.Tensor:
        """The images with the pending work of at least `rows` done: what is still pending at most flips those.

        In the same call, that of the samples which are `filled` by the next warp and have a colour pending.
        """
        self._settle((self._tabled | self._warped | self._colored) & rows | self._colored & filled)
        return self._images

    # ------------------------------------------------------------------------------------------ running

    def _settle(self, conflict: Touched) -> None:
        """Do the pending work of some samples, so that an earlier stage may follow it."""
        if not np.any(conflict):
            return
        if np.all(conflict) or self.size != tuple(self._images.shape[2:]):
            self.images()
            return
        chosen = np.flatnonzero(conflict)
        index = torch.from_numpy(chosen).to(self._images.device, non_blocking=True)
        done = self._run(chosen, index)
        images = self._images if self.owned else self._images.clone()
        self._images, self.owned = put(images, index, done), True
        self._forget(chosen, index)

    def _forget(self, chosen: NDArray[np.intp], index: torch.Tensor) -> None:
        """Make the pending work of the samples `chosen` the identity."""
        n = len(self)
        if self._matrix is not None:
            self._matrix = np.broadcast_to(self._matrix, (n, *self._matrix.shape[1:])).copy()
            self._matrix[chosen] = np.eye(3)[: self._matrix.shape[1]]
        if self._color is not None:
            self._color = Color(*(None if part is None else part.copy() for part in self._color))  # type: ignore[arg-type]
            for part, neutral in zip(self._color, (1.0, 0.0, 0.0), strict=True):
                if part is not None:
                    part[chosen] = neutral
        if self._table is not None:
            same = torch.arange(256, dtype=torch.uint8, device=index.device).expand(len(index), self.channels, 256)
            self._table = self._table.expand(n, -1, -1).index_copy(0, index, same)
        rest = np.ones(n, np.bool_)
        rest[chosen] = False
        self._tabled, self._warped, self._colored = self._tabled & rest, self._warped & rest, self._colored & rest

    def _run(
        self,
        chosen: NDArray[np.intp] | None = None,
        index: torch.Tensor | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The pending work on all samples, or on those `chosen` (`index` is the same on the device), in one call."""
        images, table, matrix, color = self._images, self._table, self._matrix, self._color
        if chosen is not None and index is not None:
            images = taken(images, index)
            table = table if table is None or len(table) == 1 else table[index]
            matrix = matrix if matrix is None or len(matrix) == 1 else matrix[chosen]
            color = None if color is None else Color(*(None if p is None else p[chosen] for p in color))  # type: ignore[arg-type]
        device = images.device
        if matrix is None:
            if table is not None and color is None and mean is None and device.type == "cpu":
                return apply_table(images, table)
            matrix = _IDENTITY
        color_matrix = None if color is None else _color_tensor(color, images, table)
        # The operation has no gradient for colours, which contrast makes of the images.
        fused = color_matrix is None or (self.channels == 3 and not color_matrix.requires_grad)
        warped = affine_warp(
            images,
            torch.from_numpy(matrix).to(device, non_blocking=True),
            size=self.size,
            interpolation=self._sampling.interpolation or "nearest",
            padding_mode=self._sampling.padding_mode or "edge",
            fill=self._sampling.fill,
            antialias=self._sampling.antialias,
            table=table,
            color_matrix=color_matrix if fused else None,
            mean=mean if fused else None,
            std=std if fused else None,
            dtype=dtype if fused else _wide(images.dtype),
        )
        if fused or color_matrix is None:
            return warped
        return _colored(warped, color_matrix, mean, std, dtype or images.dtype)


_IDENTITY = np.eye(3)[None, :2]
_ONE = np.ones(1)

# ------------------------------------------------------------------------------------------------ geometry


def _composed(first: Matrix, then: Matrix) -> Matrix:
    """As geometry.compose, in a third of its time where both are affine."""
    if first.shape[-2] == 3 or then.shape[-2] == 3:
        return geometry.compose(first, then)
    result: Matrix = first[:, :, :1] * then[:, :1] + first[:, :, 1:2] * then[:, 1:]
    result[:, :, 2] += first[:, :, 2]
    return result


# ------------------------------------------------------------------------------------------------ colour


def _jitter(brightness: Floats | None, contrast: Floats | None, saturation: Floats | None) -> Color:
    """x ↦ b·(c·(s·x + (1-s)·grey(x)) + (1-c)·mean grey): with nothing clipped in between, the factors commute."""
    b, c, s = (_ONE if factor is None else factor for factor in (brightness, contrast, saturation))
    both = b * c
    own = both * s
    return Color(own, both - own, None if contrast is None else b - both)


def _after(first: Color, step: Color) -> Color:
    """`step` applied to the result of `first`, the greys of which are `level` times the source's plus the mean's."""
    level = first.own + first.gray
    gray = step.own * first.gray + step.gray * level
    mean = None if first.mean is None else (step.own + step.gray) * first.mean
    if step.mean is not None:
        added = step.mean * (level if first.mean is None else level + first.mean)
        mean = added if mean is None else mean + added
    return Color(step.own * first.own, gray, mean)


def _color_tensor(color: Color, images: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor:
    """(N, C, C + 1) float64 on the images' device; the mean grey is measured there, without a synchronisation."""
    n, channels = images.shape[:2]
    packed = np.zeros((n, channels, channels + 1))
    packed[:, :, :channels] = color.gray[:, None, None] * np.array(luma_weights(channels))
    packed.reshape(n, channels * (channels + 1))[:, :: channels + 2] += color.own[:, None]  # the diagonal
    if color.mean is None:
        return torch.from_numpy(packed).to(images.device, non_blocking=True)
    if images.device.type != "cpu" or torch.compiler.is_compiling() or images.requires_grad:
        result = torch.from_numpy(packed).to(images.device, non_blocking=True)
        weight = torch.from_numpy(color.mean).to(images.device, non_blocking=True)
        result[:, :, channels] = (weight * mean_gray(images, table))[:, None]
        return result
    if np.count_nonzero(color.mean) == n:
        packed[:, :, channels] = (color.mean * mean_gray(images, table).numpy())[:, None]
    else:  # the others' means are not worth measuring
        chosen = np.flatnonzero(color.mean)
        seen = mean_gray(
            taken(images, torch.from_numpy(chosen)), table if table is None or len(table) == 1 else table[chosen]
        )
        packed[chosen, :, channels] = (color.mean[chosen] * seen.numpy())[:, None]
    return torch.from_numpy(packed)


def _colored(
    values: torch.Tensor,
    color_matrix: torch.Tensor,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The colour stage of `affine_warp`, for what that does not serve: `values` in [0, 1], floating."""
    channels = values.shape[1]
    matrix = color_matrix.to(values.dtype)
    flat = values.flatten(2)
    result = torch.baddbmm(matrix[:, :, channels:], matrix[:, :, :channels], flat).clamp_(0, 1).view(values.shape)
    if mean is not None and std is not None:
        m, s = (torch.tensor(t, dtype=values.dtype, device=values.device).view(1, -1, 1, 1) for t in (mean, std))
        result = (result - m) / s
    if dtype == torch.uint8:
        result = result.mul_(255).round_()
    layout = torch.contiguous_format if values.is_contiguous() else torch.channels_last
    return result.to(dtype, memory_format=layout)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
