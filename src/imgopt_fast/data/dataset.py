"""What a training needs of a data set: uint8 images, labels, and three splits that do not overlap.

Images stay decoded: in memory, or in a file that is mapped into it (imgopt_fast.data.cache). A batch is then one
gather, and no worker process decodes or copies anything.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgopt_fast.data.prefetch import prefetched

PARTS = ("train", "validation", "test")
TEST_FRACTION = 0.1  # of the images of a set without a test split
STATISTICS_IMAGES = 20_000  # the moments of that many images are known to a fraction of a grey level
Share = Callable[[Tensor], Tensor]


class DataError(ValueError):
    """The data cannot be used; the message is one line that names the file or folder and what is wrong with it."""


class Skipped(NamedTuple):
    """An image that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Split:
    """`images` (N, C, H, W) uint8 in channels_last memory and `labels` (N,) int64.

    `resident` is false for images in a mapped file: a gather may then wait for the disk, and is left to a thread.
    """

    images: Tensor
    labels: Tensor
    resident: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> "Split":
        if device == self.images.device:
            return self
        return Split(self.images.to(device), self.labels.to(device))

    def unreadable(self) -> tuple[Skipped, ...]:
        """None: what could not be decoded is in no split."""
        return ()

    def take(self, index: Tensor) -> "Split":
        """The images at `index`, in its order, in memory."""
        index = index.to(self.labels.device, non_blocking=True)
        rows = self.images.permute(0, 2, 3, 1).index_select(0, index)  # a tenth of the time of indexing images
        return Split(rows.permute(0, 3, 1, 2), self.labels[index])

    def first(self, count: int) -> "Split":
        """The first `count` images, or all of them."""
        return self.take(torch.arange(min(count, len(self))))

    def sample(self, count: int) -> "Split":
        """`count` images, or all, evenly spaced: folders come class by class."""
        count = min(count, len(self))
        return self.take(torch.arange(count) * len(self) // max(1, count))

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, first: int = 0, last: bool = False, share: Share | None = None
    ) -> Iterator[tuple[Tensor, "Split"]]:
        """Batches of `epoch` from number `first` on, each with the positions of its images.

        The order is a pure function of (seed, epoch). A short batch at the end is dropped unless `last` is set or it
        is the only one: batch norm's statistics and the steps per second are those of full batches. `share` picks the
        positions that this process takes of a batch.
        """
        order = torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self)))

        def gathered() -> Iterator[tuple[Tensor, Split]]:
            for batch in range(first, batches_per_epoch(len(self), batch_size, last=last)):
                index = order[batch * batch_size : (batch + 1) * batch_size]
                index = index if share is None else share(index)
                yield index, self.take(index)

        return gathered() if self.resident else prefetched(gathered())

    def in_order(self, batch_size: int) -> Iterator["Split"]:
        """All images in order; the last batch may be short."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield Split(images.contiguous(memory_format=torch.channels_last), labels)


class TrainingSplit(Protocol):
    """What a training asks of its images: a Split, or a stream of shards that never is in memory as a whole."""

    @property
    def labels(self) -> Tensor: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...
    def to(self, device: torch.device) -> "TrainingSplit": ...
    def unreadable(self) -> tuple[Skipped, ...]: ...
    def first(self, count: int) -> Split: ...
    def sample(self, count: int) -> Split: ...
    def in_order(self, batch_size: int) -> Iterator[Split]: ...
    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, first: int = 0, last: bool = False, share: Share | None = None
    ) -> Iterator[tuple[Tensor, Split]]: ...


def batches_per_epoch(images: int, batch_size: int, *, last: bool = False) -> int:
    """Full batches, one at least; with `last` the short one at the end, too."""
    return -(-images // batch_size) if last else max(1, images // batch_size)


@dataclass(frozen=True)
class Dataset:
    """Training images, validation images for every choice, and test images that are looked at once, at the end.

    `skipped` are the images that could not be read when it was loaded; a stream finds more while it is read. `splits`
    says where the splits come from that the set did not bring itself.
    """

    name: str
    class_names: tuple[str, ...]
    train: TrainingSplit
    validation: Split
    test: Split
    skipped: tuple[Skipped, ...] = ()
    splits: str = ""

    def to(self, device: torch.device) -> "Dataset":
        """The same with the images and labels in the memory of `device`: a batch then crosses no bus."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    @property
    def channels(self) -> int:
        return self.train.shape[0]

    def left_out(self) -> tuple[Skipped, ...]:
        """Every image that could not be read so far."""
        return (*self.skipped, *self.train.unreadable())

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel of STATISTICS_IMAGES training images or all, in [0, 1] units."""
        images = self.train.sample(STATISTICS_IMAGES).images
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


class Parts(NamedTuple):
    """How a set is split that names the splits `given`.

    `role`: what each of them serves as. `taken`: the splits that the training images give up, each with the interval of
    `stable_fraction` that its images lie in. `about`: the same for people.
    """

    role: dict[str, str]
    taken: dict[str, tuple[float, float]]
    about: str


def parts_of(given: Collection[str], validation: float) -> Parts:
    """A single split beside `train` is the test, whatever it is called: its accuracy is what others publish."""
    lone = "validation" in given and "test" not in given
    role = {part: "test" if lone and part == "validation" else part for part in given}
    taken, low = dict[str, tuple[float, float]](), 0.0
    for part, share in (("validation", validation), ("test", TEST_FRACTION)):
        if part not in role.values():
            taken[part], low = (low, low + share), low + share
    about = f"{' and '.join(taken)} taken from the training images" if taken else ""
    return Parts(role, taken, about + ", val is the test" * lone)


Arrays = tuple[NDArray[np.uint8], NDArray[np.integer]]  # images (N, H, W), (N, H, W, C) and labels (N,)


def from_arrays(
    name: str, parts: Mapping[str, Arrays], class_names: Sequence[str] | None, *, validation: float
) -> Dataset:
    """The data set of published arrays `parts`: "train", and "validation" and "test" where there are such.

    What is missing is taken from the training images by a hash of their position, and validation images alone are the
    test, as for folders. Without `class_names` the labels name the classes. Raises DataError for arrays that do not fit
    together.
    """
    for part, (images, labels) in parts.items():
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.shape != images.shape[:1]:
            raise DataError(
                f"{name}: expected uint8 images (N, H, W) or (N, H, W, C) and a label each for {part}, "
                f"got {images.dtype} {images.shape} and labels {labels.shape}"
            )
    found = np.unique(np.concatenate([labels for _, labels in parts.values()]))
    if class_names is None:
        class_names = [str(label) for label in found]
        parts = {part: (images, np.searchsorted(found, labels)) for part, (images, labels) in parts.items()}
    elif len(found) and not 0 <= found[0] <= found[-1] < len(class_names):
        raise DataError(f"{name}: expected labels from 0 to {len(class_names) - 1}, got {found[0]} to {found[-1]}")
    roles = parts_of(parts, validation)
    splits = {roles.role[part]: _as_split(*arrays) for part, arrays in parts.items()}
    train, kept = splits["train"], torch.ones(len(splits["train"]), dtype=torch.bool)
    position = torch.tensor([stable_fraction(f"image {i}") for i in range(len(train))], dtype=torch.float64)
    for part, (least, end) in roles.taken.items():
        chosen = (position >= least) & (position < end)
        splits[part], kept = train.take(chosen.nonzero().flatten()), kept & ~chosen
    splits["train"] = train.take(kept.nonzero().flatten()) if roles.taken else train
    for part, split in splits.items():
        if not len(split):
            raise DataError(f"{name}: too few images, none for the {part} split")
    return Dataset(name, tuple(class_names), splits["train"], splits["validation"], splits["test"], splits=roles.about)


def _as_split(images: NDArray[np.uint8], labels: NDArray[np.integer]) -> Split:
    tensor = torch.from_numpy(np.require(images, requirements=("C", "W")))
    images_first = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return Split(images_first, torch.from_numpy(labels.astype(np.int64)))
