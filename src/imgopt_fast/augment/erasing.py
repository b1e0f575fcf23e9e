"""RandomErasing: a random rectangle of each sample is overwritten.

Z. Zhong et al., "Random erasing data augmentation", AAAI 2020; parameters and distributions are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from imgopt_fast.augment import philox
from imgopt_fast.augment.arguments import CROP_ATTEMPTS, Uniforms, interval, probability, trial_sides
from imgopt_fast.augment.fold import Fold
from imgopt_fast.augment.geometry import Size
from imgopt_fast.augment.transform import Draw, Transform


class RandomErasing(Transform):
    """With probability `p`, overwrites a rectangle.

    Args:
        p: in [0, 1].
        scale: (low, high) of its area, as a fraction of the image.
        ratio: (low, high) of its height / width, log-uniform.
        value: a number, one per channel, or "random" for noise in every pixel: standard normal in
            floating images, uniform levels in uint8 ones.
        inplace: overwrite the images that came, unless an earlier transform has made new ones.
    """

    words = 2 * CROP_ATTEMPTS + 4
    decides = True

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float | Sequence[float] | str = 0.0,
        inplace: bool = False,
    ) -> None:
        super().__init__()
        self.p = probability(p)
        self.scale, self.ratio = interval("scale", scale), interval("ratio", ratio)
        if not 0 <= self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: expected fractions in [0, 1], got {scale}")
        if self.ratio[0] <= 0:
            raise ValueError(f"ratio: expected positive numbers, got {ratio}")
        if isinstance(value, str):
            if value != "random":
                raise ValueError(f'value: expected numbers or "random", got {value!r}')
            self.value: tuple[float, ...] | None = None
        else:
            self.value = (float(value),) if isinstance(value, (int, float)) else tuple(float(v) for v in value)
        self.inplace = inplace

    def draw(self, u: Uniforms, size: Size) -> Draw:
        trials = u[: 2 * CROP_ATTEMPTS]
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        h, w = trial_sides(trials[0::2], trials[1::2], size, self.scale, log_ratio)
        fits = (h < size[0]) & (w < size[1]) & (h > 0) & (w > 0)
        sample = np.arange(fits.shape[1])
        first = fits.argmax(axis=0)
        found = fits[first, sample] & (u[-4] < self.p)
        h, w = np.where(found, h[first, sample], 0.0), np.where(found, w[first, sample], 0.0)
        corner = np.floor(u[-3] * (size[0] - h + 1)), np.floor(u[-2] * (size[1] - w + 1))
        draw = {"top": corner[0], "left": corner[1], "height": h, "width": w}
        draw = {name: np.where(found, values, 0.0).astype(np.int64) for name, values in draw.items()}
        if self.value is None:
            draw["noise"] = (u[-1] * 2.0**32).astype(np.int64)  # the key of the sample's noise
        return draw

    def record(self, fold: Fold, draw: Draw) -> None:
        images = fold.images()
        images = images if fold.owned or self.inplace else images.clone()
        for i in np.flatnonzero(draw["height"]):
            top, left, height, width = (int(draw[name][i]) for name in ("top", "left", "height", "width"))
            area = images[i, :, top : top + height, left : left + width]
            area.copy_(_noise(int(draw["noise"][i]), area) if self.value is None else _column(self.value, area))
        fold.replace(images)

    def extra_repr(self) -> str:
        value = "random" if self.value is None else self.value
        return f"p={self.p}, scale={self.scale}, ratio={self.ratio}, value={value}"


def _column(value: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _noise(seed: int, like: torch.Tensor) -> torch.Tensor:
    """Noise of the shape of `like`, the same on every device: uniform levels, or normal values (Box and Muller)."""
    blocks = -(-like.numel() // philox.WORDS_PER_BLOCK)
    u = philox.uniforms(seed, 0, np.arange(blocks), np.zeros(1, np.uint64))
    if like.dtype == torch.uint8:
        levels = (u.T.ravel()[: like.numel()] * 256).astype(np.uint8)
        return torch.from_numpy(levels).view(like.shape).to(like.device, non_blocking=True)
    radius, turn = np.sqrt(-2.0 * np.log1p(-u[:2])), 2.0 * np.pi * u[2:]
    normal = np.concatenate([radius * np.cos(turn), radius * np.sin(turn)]).T.ravel()[: like.numel()]
    return torch.from_numpy(normal).view(like.shape).to(like.device, like.dtype, non_blocking=True)
