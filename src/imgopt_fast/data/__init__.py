"""Images on disk to uint8 tensors in memory."""

from pathlib import Path

from imgopt_fast.data.dataset import DataError, Dataset, Split, batches_per_epoch, stable_fraction
from imgopt_fast.data.embedded import load_embedded
from imgopt_fast.data.folder import decode, load_folder, load_labelled

__all__ = [
    "DataError",
    "Dataset",
    "Split",
    "batches_per_epoch",
    "decode",
    "load_dataset",
    "load_labelled",
    "stable_fraction",
]


def load_dataset(path: Path | None = None, *, image_size: int | None = None, validation: float = 0.1) -> Dataset:
    """The data set at `path`, a class folder or a zip archive of one; without a path the embedded Fashion-MNIST subset.

    `image_size` is the side of the square images that a folder gives. `validation` is the share of the training
    images that a set without a validation split gives up for one.

    Raises DataError, a ValueError, when the data cannot be read.
    """
    if not 0 < validation < 0.5:
        raise ValueError(f"validation: expected a share between 0 and 0.5, got {validation}")
    if path is None:
        if image_size not in (None, 28):
            raise ValueError(f"image_size: the embedded images are 28x28, got {image_size}")
        return load_embedded(validation)
    return load_folder(path, image_size=image_size, validation=validation)
