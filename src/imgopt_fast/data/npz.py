"""Reads `.npz` archives of arrays, under the names that MedMNIST, Keras and this project's own subset use."""

import zipfile
from pathlib import Path

import numpy as np

from imgopt_fast.data.dataset import Arrays, DataError, Dataset, from_arrays

NAMES = {
    "train": (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"), ("x", "y")),
    "validation": (("val_images", "val_labels"), ("x_val", "y_val")),
    "test": (("test_images", "test_labels"), ("x_test", "y_test")),
}


def load_npz(path: Path, *, validation: float) -> Dataset:
    """The arrays in the file `path`; pickled objects are not read. Raises DataError."""
    parts: dict[str, Arrays] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for part, names in NAMES.items():
                for images, labels in names:
                    if images in arrays and labels in arrays:
                        parts[part] = arrays[images], arrays[labels].squeeze()
                        break
            class_names = [str(name) for name in arrays["class_names"]] if "class_names" in arrays else None
            found = ", ".join(arrays.files)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot read these arrays: {getattr(error, 'strerror', None) or error}") from error
    if "train" not in parts:
        raise DataError(f"{path}: expected arrays train_images and train_labels, found {found or 'none'}")
    return from_arrays(path.stem, parts, class_names, validation=validation)
