"""Colour: jitter, grayscale and normalisation, and exact HSV.

Brightness, contrast and saturation are linear maps, so they join the pass that warps; without clipping in between
they commute, and their order shows only around the hue, which bends and takes a pass of its own. Grey is ITU-R BT.601
(0.299, 0.587, 0.114), unrounded. Images with other than three channels are jittered too: their grey is the mean of the
channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from imgopt_fast.augment.arguments import Uniforms, between, interval, number, per_channel, probability
from imgopt_fast.augment.fold import Fold
from imgopt_fast.augment.geometry import Size
from imgopt_fast.augment.transform import Draw, Transform
from imgopt_fast.ops.photometric import adjust_hue

# ---------------------------------------------------------------------------------------------------- transforms


class ColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue at random, in random order.

    Args:
        brightness, contrast, saturation: a number v for factors uniform in [max(0, 1 - v), 1 + v], or (low, high).
            None leaves it. Contrast scales about the mean grey of the source.
        hue: a number h ≤ 0.5 for shifts in [-h, h] turns of the colour circle, or (low, high); RGB only: other images
            keep theirs. None leaves it.
    """

    def __init__(
        self,
        brightness: float | Sequence[float] | None = None,
        contrast: float | Sequence[float] | None = None,
        saturation: float | Sequence[float] | None = None,
        hue: float | Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.brightness = _factors("brightness", brightness)
        self.contrast = _factors("contrast", contrast)
        self.saturation = _factors("saturation", saturation)
        ranges = {"brightness": self.brightness, "contrast": self.contrast, "saturation": self.saturation}
        self._factors = [(i, name, bounds) for i, (name, bounds) in enumerate(ranges.items()) if bounds is not None]
        self.hue = _shifts(hue)
        self.words = 8 if self.hue else 3  # with a hue: its shift, and a place in the order for each of the four

    def draw(self, u: Uniforms, size: Size) -> Draw:
        draw: Draw = {name: between(u[i], bounds) for i, name, bounds in self._factors}
        if self.hue is not None:
            draw["hue"] = between(u[3], self.hue)
            draw["after_hue"] = (u[4:7] > u[7]).T  # whether brightness, contrast, saturation follow the hue
        return draw

    def record(self, fold: Fold, draw: Draw) -> None:
        factors = [draw.get(name) for name in ("brightness", "contrast", "saturation")]
        if "hue" not in draw or fold.channels != 3:
            if any(f is not None for f in factors):
                fold.color(factors[0], factors[1], factors[2])
            return
        later = draw["after_hue"].T
        before = [None if f is None else np.where(late, 1.0, f) for f, late in zip(factors, later, strict=True)]
        after = [None if f is None else np.where(late, f, 1.0) for f, late in zip(factors, later, strict=True)]
        if any(f is not None for f in factors):
            fold.color(before[0], before[1], before[2])
        fold.replace(adjust_hue(fold.images(), torch.from_numpy(draw["hue"])))
        if any(f is not None for f in factors):
            fold.color(after[0], after[1], after[2])

    def extra_repr(self) -> str:
        return f"brightness={self.brightness}, contrast={self.contrast}, saturation={self.saturation}, hue={self.hue}"


class RandomGrayscale(Transform):
    """Replaces the colours by their grey, in all channels, with probability `p`; images of one channel stay."""

    words = 1

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = probability(p)

    def draw(self, u: Uniforms, size: Size) -> Draw:
        return {"gray": u[0] < self.p}

    def record(self, fold: Fold, draw: Draw) -> None:
        if fold.channels > 1:
            fold.color(saturation=np.where(draw["gray"], 0.0, 1.0), rows=draw["gray"])

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Normalize(Transform):
    """`(value - mean) / std` in units of [0, 1], floating output; uint8 images are divided by 255 on the way.

    Args:
        mean, std: one number per channel.
        inplace: accepted for torchvision's sake; the result is always new memory.
        dtype: of the result; by default float32 for uint8 images, and that of floating images.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], inplace: bool = False, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.mean, self.std = per_channel("mean", mean), per_channel("std", std)
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean, std: expected the same number of channels, got {mean} and {std}")
        if 0.0 in self.std:
            raise ValueError(f"std: expected no zero, got {std}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
        self.dtype = dtype

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype or (torch.float32 if dtype == torch.uint8 else dtype)

    def record(self, fold: Fold, draw: Draw) -> None:
        fold.normalize(self.mean, self.std, self.output_dtype(fold.dtype))

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}, dtype={self.dtype}"


# ---------------------------------------------------------------------------------------------------- functions


def rgb_to_hsv(images: torch.Tensor) -> torch.Tensor:
    """Hue, saturation and value of RGB images (..., 3, H, W), floating in [0, 1].

    Hue is in turns, [0, 1), red at 0; saturation is (max - min) / max. Grey has hue 0, black saturation 0 too. The
    result has the shape and dtype of `images`. A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978.

    Raises:
        TypeError, ValueError: `images` is not floating, or has no three channels.
    """
    _check_rgb(images)
    r, g, b = images.unbind(-3)
    value, low = images.amax(-3), images.amin(-3)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sixth = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, 2.0 + (b - r) / divisor, 4.0 + (r - g) / divisor)
    )
    hue = torch.where(chroma > 0, sixth / 6.0, 0.0)
    hue = torch.where(hue < 0, hue + 1.0, hue)
    hue = torch.where(hue >= 1.0, 0.0, hue)  # a tiny negative plus one rounds to one
    saturation = chroma / torch.where(value > 0, value, 1.0)
    return torch.stack([hue, saturation, value], dim=-3)


def hsv_to_rgb(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `rgb_to_hsv`; any real hue is taken modulo one turn. Raises what that raises."""
    _check_rgb(images)
    hue, saturation, value = images.unbind(-3)
    chroma = value * saturation
    # A channel falls from `value` by `chroma` where the hue is far from it: at 5, 3 and 1 sixths from its own edge.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = torch.remainder(hue * 6.0 + offset, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0))
    return torch.stack(channels, dim=-3)


def scale_color(images: torch.Tensor, factor: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
    """`images · factor`, clipped to the range of the dtype: (N, C, H, W), uint8 or floating in [0, 1].

    `factor` is a number, one per channel (C,), or one per sample and channel (N, C). uint8 rounds half to even. The
    result has the shape, dtype and layout of `images`.

    Raises:
        TypeError, ValueError: `images` or `factor` has a wrong dtype or shape; the text names it.
    """
    if images.dim() != 4:
        raise ValueError(f"images: expected (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
    n, channels = images.shape[:2]
    factors = np.asarray(factor.cpu() if isinstance(factor, torch.Tensor) else factor, dtype=np.float64)
    if factors.shape not in ((), (channels,), (n, channels), (1, channels), (n, 1)):
        raise ValueError(f"factor: expected a number, ({channels},) or ({n}, {channels}), got {factors.shape}")
    if images.dtype != torch.uint8:
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        scale = torch.from_numpy(np.atleast_1d(factors)).to(images.device, wide, non_blocking=True)
        return (images * scale.view(*scale.shape, 1, 1)).clamp(0, 1).to(images.dtype)
    levels = np.rint(np.broadcast_to(factors, (n, channels))[:, :, None] * np.arange(256)).clip(0, 255)
    fold = Fold(images)
    fold.table(torch.from_numpy(levels.astype(np.uint8)).to(images.device, non_blocking=True))
    return fold.images()


def _check_rgb(images: torch.Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating dtype, values in [0, 1], got {images.dtype}")
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: expected (..., 3, H, W), got {tuple(images.shape)}")


def _factors(name: str, value: float | Sequence[float] | None) -> tuple[float, float] | None:
    """The interval of a factor; None where it is always one."""
    if value is None:
        return None
    if isinstance(value, (int, float)):
        if number(name, value) < 0:
            raise ValueError(f"{name}: a single number must not be negative, got {value}")
        low, high = max(0.0, 1.0 - value), 1.0 + value
    else:
        low, high = interval(name, value)
        if low < 0:
            raise ValueError(f"{name}: expected factors that are not negative, got {value}")
    return None if low == high == 1.0 else (low, high)


def _shifts(hue: float | Sequence[float] | None) -> tuple[float, float] | None:
    if hue is None:
        return None
    low, high = (-float(hue), float(hue)) if isinstance(hue, (int, float)) else interval("hue", hue)
    if not -0.5 <= low <= high <= 0.5:
        raise ValueError(f"hue: expected shifts in [-0.5, 0.5], got {hue}")
    return None if low == high == 0.0 else (low, high)
