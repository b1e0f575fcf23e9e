"""The data set that ships with the package: a subset of Fashion-MNIST, made by make_subset.py."""

from importlib.resources import as_file, files

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.data.dataset import Dataset, Split, stable_fraction

CLASS_NAMES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_embedded(validation: float) -> Dataset:
    """10,000 training images, about the share `validation` of them held out, always the same, and 2,000 test images."""
    with as_file(files(__package__) / "fashion_mnist.npz") as path, np.load(path) as arrays:
        train = _split(arrays["train_images"], arrays["train_labels"])
        test = _split(arrays["test_images"], arrays["test_labels"])
    held_out = torch.tensor([stable_fraction(f"fashion-mnist/{i}") < validation for i in range(len(train))])
    return Dataset(
        "Fashion-MNIST subset",
        CLASS_NAMES,
        train.take((~held_out).nonzero().flatten()),
        train.take(held_out.nonzero().flatten()),
        test,
        splits="validation taken from the training images",
    )


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    return Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long())
