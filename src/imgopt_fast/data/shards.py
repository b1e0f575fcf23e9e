"""Streams WebDataset shards: tar files of samples, read one after the other, for data that outgrows a disk.

The webdataset library (the extra `shards`) opens and parses them, from files, from `pipe:` commands and from wherever
else it can. One pass over all shards lists keys and labels; the list is kept in the cache folder. From then on only
training images are streamed: shards in a new order in every epoch, a buffer that shuffles their samples, decoding in
threads ahead of the trainer. Order and batches are functions of (seed, epoch), so that a training resumes within an
epoch; the held-out images are decoded into memory once.
"""

import itertools
import json
import os
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imgopt_fast.data.cache import cache_folder
from imgopt_fast.data.dataset import (
    PARTS,
    DataError,
    Dataset,
    Share,
    Skipped,
    Split,
    batches_per_epoch,
    parts_of,
    stable_fraction,
)
from imgopt_fast.data.decode import Header, UnreadableError, bombs_handled, decode_into, read_header
from imgopt_fast.data.files import SUFFIXES
from imgopt_fast.data.folder import SPLITS
from imgopt_fast.data.prefetch import prefetched

BUFFER = 2048  # samples among which the next one is drawn; shards hold some thousands
LABELS = ("cls", "label")  # extensions of a label, a number or a name
CLASS_LIST = "classes.txt"  # beside the shards: a name per line for labels that are numbers

Samples = list[tuple[int, bytes]]


class Listing(NamedTuple):
    """What the shards hold: the key and the label of each image, in order, and how many images each shard has."""

    keys: list[str]
    labels: list[str]
    counts: list[int]


def find_shards(path: str) -> list[str]:
    """The shards that `path` names: a pattern such as `train-{000..009}.tar`, a URL, or a folder or file of samples."""
    if "{" in path or ":" in path.split("/")[0]:
        return list(_webdataset().shardlists.expand_urls(path))
    files = sorted(Path(path).glob("*.tar")) if os.path.isdir(path) else [Path(path)] if path.endswith(".tar") else []
    if not files or not files[0].is_file():
        return []
    return [str(file) for file in files] if _holds_samples(files[0]) else []


def load_shards(path: str, *, image_size: int | None, validation: float) -> Dataset:
    """The samples of the shards at `path`, in the splits that their names say, else held out by a hash of their keys.

    Raises DataError.
    """
    urls = find_shards(path)
    listing = _listing(urls)
    labels = sorted(set(listing.labels), key=lambda label: (int(label) if label.isdigit() else 0, label))
    if len(labels) < 2:
        raise DataError(f"{path}: expected images of two classes at least, found {len(labels)}")
    number = {label: i for i, label in enumerate(labels)}
    header = _first_header(path, urls)
    side = image_size or max(header.size)
    everything = ShardStream(
        tuple(urls),
        tuple(listing.counts),
        tuple(listing.keys),
        torch.tensor([number[label] for label in listing.labels]),
        torch.arange(len(listing.labels)),
        (1 if header.grey else 3, side, side),
    )
    parts, about = _parts(urls, listing, validation)
    streams = {part: replace(everything, positions=chosen.nonzero().flatten()) for part, chosen in parts.items()}
    for part, stream in streams.items():
        if not len(stream):
            raise DataError(f"{path}: too few images, none for the {part} split")
    validation_split, test = (streams[part].first(len(streams[part])) for part in ("validation", "test"))
    class_names = tuple(_class_names(path, labels))
    return Dataset(Path(path).name, class_names, streams["train"], validation_split, test, splits=about)


def _parts(urls: Sequence[str], listing: Listing, validation: float) -> tuple[dict[str, Tensor], str]:
    """Which samples each split has: all of `test-000.tar` beside a `train-000.tar`; what no name says, by hash."""
    words = [re.split("[^a-z]+", Path(url).name.lower()) for url in urls]
    named = [next((SPLITS[word] for word in some if word in SPLITS), "train") for some in words]
    if "train" not in named:
        named = ["train"] * len(urls)
    roles = parts_of(named, validation)
    shard = torch.arange(len(urls)).repeat_interleave(torch.tensor(listing.counts))
    parts = {part: torch.tensor([roles.role[name] == part for name in named])[shard] for part in PARTS}
    position = torch.tensor([stable_fraction(key) for key in listing.keys], dtype=torch.float64)
    for part, (low, high) in roles.taken.items():
        parts[part] = parts["train"] & (position >= low) & (position < high)
    parts["train"] = parts["train"] & ~parts["validation"] & ~parts["test"]
    return parts, roles.about


def _first_header(path: str, urls: Sequence[str]) -> Header:
    with bombs_handled():
        for _, data in _samples(urls):
            with suppress(UnreadableError):
                return read_header(data)
    raise DataError(f"{path}: no image that can be read")


@dataclass(frozen=True)
class ShardStream:
    """The images at `positions` among all those of the shards; `all_labels` has one for each image of the shards.

    `failed` has what could not be decoded so far, by position; the streams of one set of shards share it.
    """

    urls: tuple[str, ...]
    counts: tuple[int, ...]
    keys: tuple[str, ...]
    all_labels: Tensor
    positions: Tensor
    shape: tuple[int, int, int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    failed: dict[int, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def labels(self) -> Tensor:
        return self.all_labels[self.positions].to(self.device)

    def to(self, device: torch.device) -> "ShardStream":
        return replace(self, device=device)

    def unreadable(self) -> tuple[Skipped, ...]:
        return tuple(Skipped(self.keys[position], self.failed[position]) for position in sorted(self.failed))

    def first(self, count: int) -> Split:
        """The first `count` images, or all of them, in memory."""
        _, split = next(self._decoded(_batched(self._in_order(), min(count, len(self)))))
        return split

    def sample(self, count: int) -> Split:
        """The first ones: shards are written in a random order, and to spread the sample would read them all."""
        return self.first(count)

    def in_order(self, batch_size: int) -> Iterator[Split]:
        """All images in order; the last batch may be short."""
        return (split for _, split in prefetched(self._decoded(_batched(self._in_order(), batch_size))))

    def shuffled(
        self, batch_size: int, *, seed: int, epoch: int, first: int = 0, last: bool = False, share: Share | None = None
    ) -> Iterator[tuple[Tensor, Split]]:
        """As Split.shuffled; shards in a random order, their samples through a buffer of BUFFER."""
        count = batches_per_epoch(len(self), batch_size, last=last)
        batches = _batched(self._in_random_order(seed, epoch), batch_size)
        return prefetched(self._decoded(itertools.islice(batches, first, count), share))

    def _in_order(self) -> Iterator[tuple[int, bytes]]:
        wanted = set(self.positions.tolist())
        return (sample for sample in _samples(self.urls) if sample[0] in wanted)

    def _in_random_order(self, seed: int, epoch: int) -> Iterator[tuple[int, bytes]]:
        wanted, starts = set(self.positions.tolist()), np.cumsum([0, *self.counts])
        order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(len(self.urls))
        samples = (
            (int(starts[shard]) + i, data)
            for shard in order
            for i, data in _samples([self.urls[shard]])
            if int(starts[shard]) + i in wanted
        )
        shuffled = _webdataset().shuffle(BUFFER, initial=BUFFER, rng=random.Random(f"{seed} {epoch}"))
        return iter(shuffled(samples))

    def _decoded(self, batches: Iterator[Samples], share: Share | None = None) -> Iterator[tuple[Tensor, Split]]:
        """Batches of what can be read, with the positions of their images."""
        channels, height, width = self.shape

        def decode_one(sample: tuple[int, bytes]) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
            pixels = np.empty((height, width, channels), np.uint8)
            try:
                decode_into(sample[1], pixels)
            except UnreadableError as error:
                self.failed[sample[0]] = str(error)
                return None
            return pixels

        with bombs_handled(), ThreadPoolExecutor(os.cpu_count()) as pool:
            for batch in batches:
                index, content = torch.tensor([position for position, _ in batch]), dict(batch)
                taken = (index if share is None else share(index)).tolist()
                images = list(pool.map(decode_one, [(position, content[position]) for position in taken]))
                read = [(position, image) for position, image in zip(taken, images, strict=True) if image is not None]
                if not read:
                    raise DataError(f"{self.urls[0]}: a whole batch of images that cannot be read")
                kept = torch.tensor([position for position, _ in read])
                pixels = torch.from_numpy(np.stack([image for _, image in read])).permute(0, 3, 1, 2)
                yield kept, Split(pixels.to(self.device), self.all_labels[kept].to(self.device))


def _batched(samples: Iterator[tuple[int, bytes]], size: int) -> Iterator[Samples]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _samples(urls: Sequence[str]) -> Iterator[tuple[int, bytes]]:
    """The images of the shards with their number, from the first on."""
    return ((i, sample[_image_in(sample)]) for i, sample in enumerate(_raw_samples(urls)))


def _raw_samples(urls: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The samples that have an image and a label."""
    wds = _webdataset()
    for url in urls:
        try:
            with closing(wds.gopen(url)) as stream:
                files = wds.tariterators.tar_file_expander(iter([{"url": url, "stream": stream}]))
                for sample in wds.tariterators.group_by_keys(files):
                    if _image_in(sample) and _label_in(sample) is not None:
                        yield sample
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            raise DataError(f"{url}: cannot read this shard: {error}") from error


def _image_in(sample: dict[str, Any]) -> str:
    """The extension of the sample's image; "" where it has none."""
    return next((name for name in sample if f".{name.rpartition('.')[2].lower()}" in SUFFIXES), "")


def _label_in(sample: dict[str, Any]) -> str | None:
    for extension in LABELS:
        if extension in sample:
            return str(sample[extension].decode()).strip()
    if "json" in sample:
        label = json.loads(sample["json"]).get("label")
        return None if label is None else str(label)
    return None


def _listing(urls: Sequence[str]) -> Listing:
    """Made by one pass over the shards, or found in the cache folder."""
    states = [(url, os.stat(url).st_size, os.stat(url).st_mtime_ns) if os.path.isfile(url) else (url,) for url in urls]
    place = cache_folder() / f"shards-{sha256(json.dumps(states).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError, TypeError):
        return Listing(**json.loads(place.read_text()))
    found = Listing([], [], [])
    for url in urls:
        samples = [(sample["__key__"], _label_in(sample)) for sample in _raw_samples([url])]
        found.keys.extend(key for key, _ in samples)
        found.labels.extend(str(label) for _, label in samples)
        found.counts.append(len(samples))
    with suppress(OSError):  # the next run passes over the shards again
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(found._asdict()))
        partial.replace(place)
    return found


def _class_names(path: str, labels: Sequence[str]) -> Sequence[str]:
    """The lines of CLASS_LIST beside the shards where the labels are numbers, else the labels."""
    file = (Path(path) if os.path.isdir(path) else Path(path).parent) / CLASS_LIST
    if not file.is_file() or not all(label.isdigit() for label in labels):
        return labels
    lines = file.read_text().splitlines()
    try:
        return [lines[int(label)] for label in labels]
    except IndexError as error:
        raise DataError(f"{file}: expected a line for each of {len(labels)} classes, got {len(lines)}") from error


def _holds_samples(file: Path) -> bool:
    """Whether a tar file starts with samples: an image and its label side by side."""
    try:
        with tarfile.open(file, "r:") as archive:
            names = [member.name for member in itertools.islice(archive, 8)]
    except (OSError, tarfile.TarError):
        return False
    return any(name.endswith(tuple(f".{extension}" for extension in LABELS)) for name in names)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise DataError(f"shards need the webdataset library: pip install 'imgopt-fast[shards]' ({error})") from error
    return webdataset
