"""Images on disk to uint8 tensors: class folders and archives of them, published arrays, streams of shards."""

from pathlib import Path

from imgopt_fast.data.cifar import is_cifar, load_cifar
from imgopt_fast.data.dataset import (
    DataError,
    Dataset,
    Share,
    Skipped,
    Split,
    TrainingSplit,
    batches_per_epoch,
    stable_fraction,
)
from imgopt_fast.data.decode import decode, decode_whole, upright_size
from imgopt_fast.data.embedded import load_embedded
from imgopt_fast.data.folder import load_folder, load_labelled
from imgopt_fast.data.idx import find_idx, load_idx
from imgopt_fast.data.npz import load_npz
from imgopt_fast.data.shards import find_shards, load_shards

__all__ = [
    "DataError",
    "Dataset",
    "Share",
    "Skipped",
    "Split",
    "TrainingSplit",
    "batches_per_epoch",
    "decode",
    "decode_whole",
    "load_dataset",
    "load_labelled",
    "stable_fraction",
    "upright_size",
]


def load_dataset(path: str | Path | None = None, *, image_size: int | None = None, validation: float = 0.1) -> Dataset:
    """The data set at `path`; without a path the embedded Fashion-MNIST subset.

    `path` is a class folder or a zip or tar archive of one, CIFAR or IDX files as published, an `.npz` archive of
    arrays, or WebDataset shards: a folder of them, a pattern (`train-{000..009}.tar`) or what else the webdataset
    library opens. `image_size` is the side of the square images that files are decoded to. `validation` is the share
    of the training images that a set without a validation split gives up for one.

    Raises DataError, a ValueError, when the data cannot be read; single images that cannot are in `skipped`.
    """
    if not 0 < validation < 0.5:
        raise ValueError(f"validation: expected a share between 0 and 0.5, got {validation}")
    if path is None:
        return _of_size(load_embedded(validation), image_size, "the embedded images")
    place = Path(path)
    try:
        if is_cifar(place):
            return _of_size(load_cifar(place, validation=validation), image_size, place)
        if find_idx(place):
            return _of_size(load_idx(place, validation=validation), image_size, place)
        if place.suffix == ".npz":
            return _of_size(load_npz(place, validation=validation), image_size, place)
        if find_shards(str(path)):
            return load_shards(str(path), image_size=image_size, validation=validation)
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from error
    return load_folder(place, image_size=image_size, validation=validation)


def _of_size(dataset: Dataset, image_size: int | None, what: str | Path) -> Dataset:
    """`dataset`; published arrays come in one size."""
    _, height, width = dataset.train.shape
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(f"image_size: {what} are {height}x{width}, got {image_size}")
    return dataset
