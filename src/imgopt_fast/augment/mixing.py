"""MixUp and CutMix: each sample is mixed with the previous one of the batch, by its own amount, and so are the targets.

H. Zhang et al., "mixup: beyond empirical risk minimization", ICLR 2018; S. Yun et al., "CutMix: regularization strategy
to train strong classifiers with localizable features", ICCV 2019.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.augment import opaque, philox
from imgopt_fast.augment.arguments import integer, number
from imgopt_fast.augment.geometry import Size
from imgopt_fast.augment.transform import Draw, Key, Params, resolve_key

_LAST_POSITION = (1 << (32 - philox.BLOCK_BITS)) - 1  # mixing follows any pipeline, so it never shares its counters


_CACHED = 1 << 18  # floats that stay in the second-level cache


class Mixing(opaque.Numbered):
    """Called as `mix(images, targets, key=...)`; returns the mixed images and soft targets (N, classes).

    `images` (N, C, H, W) uint8 or floating. `targets` are class indices (N,), which needs `num_classes`, or already
    soft (N, classes). `generator` and `key` as for the other transforms; `make_params` and `transform` replay.
    """

    position = 0
    words = 4
    names: tuple[str, ...] = ("share",)  # of the parameters that `draw` makes

    def __init__(self, *, alpha: float = 1.0, num_classes: int | None = None) -> None:
        super().__init__()
        if not number("alpha", alpha) > 0:
            raise ValueError(f"alpha: expected a positive number, got {alpha}")
        self.alpha = float(alpha)
        self.num_classes = None if num_classes is None else integer("num_classes", num_classes, 1)

    def draw(self, u: NDArray[np.float64], size: Size) -> Draw:
        raise NotImplementedError

    def mixed(self, images: torch.Tensor, draw: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        images: torch.Tensor,
        targets: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        key: Key | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():
            return self._mix(images, targets, opaque.draws(self, _batch(images), generator, key))
        return self.transform(images, targets, self.make_params(images, generator=generator, key=key))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def make_params(
        self, images: torch.Tensor, *, generator: torch.Generator | None = None, key: Key | None = None
    ) -> Params:
        """Draw the parameters for `images` (only their shape is looked at)."""
        seed, epoch, index = resolve_key(len(_batch(images)), generator, key)
        blocks = np.array(philox.blocks_of(self.position, self.words), np.uint64)
        size = (images.shape[2], images.shape[3])
        draw = self.draw(philox.uniforms(seed, epoch, index, blocks), size)
        return Params((type(self).__name__,), (draw,), len(images), size)

    def transform(
        self, images: torch.Tensor, targets: torch.Tensor, params: Params
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Carry out `params`."""
        if len(images) != params.count:
            raise ValueError(f"images: expected {params.count} of them, as many as params has, got {len(images)}")
        (draw,) = params.draws
        on_device = {k: torch.from_numpy(v).to(images.device, non_blocking=True) for k, v in draw.items()}
        return self._mix(images, targets, on_device)

    def _mix(
        self, images: torch.Tensor, targets: torch.Tensor, draw: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(targets) != len(images):
            raise ValueError(f"targets: expected {len(images)} of them, one per image, got {len(targets)}")
        return self.mixed(images, draw), self._soft(targets, draw["share"])

    def _soft(self, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        if targets.dim() == 1 and not targets.is_floating_point():
            if self.num_classes is None:
                raise ValueError("num_classes: expected a number, as the targets are class indices")
            if targets.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would have to wait
                _check_classes(targets, self.num_classes)
            targets = torch.nn.functional.one_hot(targets.long(), self.num_classes).float()
        elif targets.dim() != 2 or not targets.is_floating_point():
            raise ValueError(
                f"targets: expected class indices (N,) or soft targets (N, classes), got {tuple(targets.shape)} of "
                f"{targets.dtype}"
            )
        return torch.lerp(targets.roll(1, 0), targets, share.to(targets.device, targets.dtype)[:, None])

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, num_classes={self.num_classes}"


class MixUp(Mixing):
    """`share · image + (1 - share) · previous image`, with share ~ Beta(alpha, alpha) per sample."""

    position = _LAST_POSITION

    def draw(self, u: NDArray[np.float64], size: Size) -> Draw:
        return {"share": symmetric_beta(u, self.alpha)}

    def mixed(self, images: torch.Tensor, draw: dict[str, torch.Tensor]) -> torch.Tensor:
        if images.dtype == torch.uint8 and _walked(images):
            share, previous, result = (
                draw["share"].float().view(-1, 1, 1, 1),
                images.roll(1, 0),
                torch.empty_like(images),
            )
            step = max(1, _CACHED // max(1, images[:1].numel()))
            for part in (slice(i, i + step) for i in range(0, len(images), step)):
                result[part] = torch.lerp(previous[part].float(), images[part].float(), share[part]).round_()
            return result
        wide = images if images.dtype == torch.float64 else images.float()
        weight = draw["share"].to(wide.dtype).view(-1, 1, 1, 1)
        result = torch.lerp(wide.roll(1, 0), wide, weight)
        return (result.round() if images.dtype == torch.uint8 else result).to(images.dtype)


class CutMix(Mixing):
    """A rectangle of 1 - Beta(alpha, alpha) of the area, at a random place, comes from the previous image.

    `share` is the part of the area that is left of the sample itself, once the rectangle is clipped to the image.
    """

    position = _LAST_POSITION - 1
    words = 6
    names = ("share", "top", "bottom", "left", "right")

    def draw(self, u: NDArray[np.float64], size: Size) -> Draw:
        height, width = size
        half = 0.5 * np.sqrt(1.0 - symmetric_beta(u[:4], self.alpha))
        y, x = np.floor(u[4] * height), np.floor(u[5] * width)
        half_y, half_x = np.trunc(half * height), np.trunc(half * width)
        top, bottom = np.clip(y - half_y, 0, height), np.clip(y + half_y, 0, height)
        left, right = np.clip(x - half_x, 0, width), np.clip(x + half_x, 0, width)
        share = 1.0 - (bottom - top) * (right - left) / (height * width)
        return {"share": share, "top": top, "bottom": bottom, "left": left, "right": right}

    def mixed(self, images: torch.Tensor, draw: dict[str, torch.Tensor]) -> torch.Tensor:
        if _walked(images):
            result = images.clone()
            edges = torch.stack([draw[name] for name in self.names[1:]], dim=1).long().tolist()
            for i, (top, bottom, left, right) in enumerate(edges):
                result[i, :, top:bottom, left:right] = images[i - 1, :, top:bottom, left:right]
            return result
        above, below, before, behind = (draw[name][:, None] for name in ("top", "bottom", "left", "right"))
        y, x = (torch.arange(n, device=images.device) for n in images.shape[2:])
        rows, columns = (y >= above) & (y < below), (x >= before) & (x < behind)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return torch.where(inside, images.roll(1, 0), images)


def _walked(images: torch.Tensor) -> bool:
    """Whether samples are mixed a few at a time: in one go torch takes 88 ms for 64 of 224 × 224, CutMix 27."""
    return images.device.type == "cpu" and not torch.compiler.is_compiling()


def _batch(images: torch.Tensor) -> torch.Tensor:
    if images.dim() != 4:
        raise ValueError(f"images: expected a batch (N, C, H, W), got {tuple(images.shape)}")
    return images


def _check_classes(targets: torch.Tensor, classes: int) -> None:
    if len(targets) and not (int(targets.min()) >= 0 and int(targets.max()) < classes):
        raise ValueError(f"targets: expected class indices from 0 to {classes - 1}, got {targets.tolist()}")


def symmetric_beta(u: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    """Beta(alpha, alpha) from four uniform numbers (4, N) in [0, 1), without rejection.

    With r = sqrt(1 - u1^(2 / (2·alpha + 1))) · cos(2·pi·u2), (1 + r) / 2 is Beta(alpha + 1, alpha + 1) (G. Ulrich,
    1984), the ratio X / (X + Y) of two gamma variables of shape alpha + 1. Each of those times its own u^(1 / alpha)
    is a gamma variable of shape alpha.
    """
    first, second = np.log1p(-u[2]), np.log1p(-u[3])
    r = np.sqrt(1.0 - (1.0 - u[0]) ** (2.0 / (2.0 * alpha + 1.0))) * np.cos(2.0 * np.pi * u[1])
    odds = 2.0 * np.arctanh(r) + (first - second) / alpha  # log of X / Y
    result: NDArray[np.float64] = 0.5 + 0.5 * np.tanh(0.5 * odds)  # the logistic function, without overflow
    return result
