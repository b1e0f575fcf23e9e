"""Makes fashion_mnist.npz: 10,000 training and 2,000 test images of Fashion-MNIST, the same number of each class.

Reads the four IDX files as published (Debian's package dataset-fashion-mnist, or github.com/zalandoresearch):

    python -m imgopt_fast.data.embedded.make_subset FOLDER

Images of a class are drawn without replacement by NumPy's PCG64 from SEED, training images from the published
training file, test images from the published test file; they keep the order in which they were published.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.data.idx import read_idx

SEED = 2017  # the year Fashion-MNIST was published
PER_CLASS = {"train": 1000, "t10k": 200}


def draw(labels: NDArray[np.uint8], per_class: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sorted positions of `per_class` images of every class."""
    chosen = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(10)]
    return np.sort(np.concatenate(chosen))


def make_subset(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """The arrays of the file: {train,test}_images (N, 28, 28) and {train,test}_labels (N,)."""
    rng = np.random.default_rng(SEED)
    arrays = {}
    for published, ours in (("train", "train"), ("t10k", "test")):
        images = read_idx(folder / f"{published}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{published}-labels-idx1-ubyte.gz")
        chosen = draw(labels, PER_CLASS[published], rng)
        arrays[f"{ours}_images"], arrays[f"{ours}_labels"] = images[chosen], labels[chosen]
    return arrays


if __name__ == "__main__":
    subset: dict[str, Any] = make_subset(Path(sys.argv[1]))
    np.savez_compressed(Path(__file__).with_name("fashion_mnist.npz"), **subset)
