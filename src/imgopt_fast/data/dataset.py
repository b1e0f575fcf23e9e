"""What a training needs of a data set: decoded uint8 images in memory, labels, and three splits that do not overlap.

Small sets stay decoded in memory: a batch is then one gather, and no worker process decodes or copies anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """The data cannot be used; the message is one line that names the file or folder and what is wrong with it."""


@dataclass(frozen=True)
class Split:
    """`images` (N, C, H, W) uint8 in channels_last memory and `labels` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, in its order."""
        return Split(self.images[index].contiguous(memory_format=torch.channels_last), self.labels[index])

    def shuffled(self, batch_size: int, *, seed: int, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, "Split"]]:
        """Batches of `epoch` from number `first` on, each with the positions of its images.

        The order is a pure function of (seed, epoch). The last batch is dropped when it is short, unless it is the
        only one: batch norm's statistics and the steps per second are those of full batches.
        """
        order = torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self)))
        for batch in range(first, batches_per_epoch(len(self), batch_size)):
            index = order[batch * batch_size : (batch + 1) * batch_size]
            yield index, self.take(index)

    def in_order(self, batch_size: int) -> Iterator["Split"]:
        """All images in order; the last batch may be short."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield Split(images, labels)


def batches_per_epoch(images: int, batch_size: int) -> int:
    return max(1, images // batch_size)


@dataclass(frozen=True)
class Dataset:
    """Training images, validation images for every choice, and test images that are looked at once, at the end."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def to(self, device: torch.device) -> "Dataset":
        """The same with the images and labels in the memory of `device`: a batch then crosses no bus."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of the training images, in [0, 1] units."""
        images = self.train.images
        # A histogram gives the exact moments without a float copy of the whole set.
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([images[:, c].flatten().bincount(minlength=256) for c in range(self.channels)]).double()
        share = counts / counts.sum(dim=1, keepdim=True)
        mean = (share * values).sum(dim=1)
        variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
        # A constant channel has no scale of its own.
        std = variance.sqrt().where(variance > 0, torch.ones(()))
        return tuple(mean.tolist()), tuple(std.tolist())


def stable_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone: splits by it survive added files, other machines and seeds."""
    return int.from_bytes(sha256(name.encode()).digest()[:8], "big") / 2**64
