"""Reads IDX files, the format in which MNIST and its successors are published (also gzip-compressed)."""

import gzip
import math
import re
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.data.dataset import Arrays, DataError, Dataset, from_arrays

UNSIGNED_BYTE = 0x08  # the third byte of the magic number says the element type; the fourth the number of dimensions
# train-images-idx3-ubyte.gz, t10k-images.idx3-ubyte, emnist-letters-test-images-idx3-ubyte, ...
IMAGES = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")


def find_idx(path: Path) -> dict[str, Path]:
    """The image files, by "train" and "test", of the folder `path` or of the set that the file `path` belongs to."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, IMAGES.fullmatch(path.name))
    if not path.is_dir() and wanted is None:
        return {}
    found: dict[str, Path] = {}
    sets = set()
    for file in sorted(folder.iterdir()):
        match = IMAGES.fullmatch(file.name)
        if match is not None and (wanted is None or match["set"] == wanted["set"]):
            sets.add(match["set"])
            found["train" if match["part"] == "train" else "test"] = file
    if len(sets) > 1:
        raise DataError(f"{path}: holds several sets ({', '.join(sorted(sets))}); name one's train-images file")
    return found


def load_idx(path: Path, *, validation: float) -> Dataset:
    """The set that `find_idx` sees at `path`. Raises DataError."""
    parts: dict[str, Arrays] = {}
    for part, images in find_idx(path).items():
        labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
        try:
            parts[part] = read_idx(images), read_idx(labels)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
            raise DataError(f"{path}: {what}") from error
    if "train" not in parts:
        raise DataError(f"{path}: expected a file train-images-idx3-ubyte, found that of the test only")
    return from_arrays((path if path.is_dir() else path.parent).name, parts, None, validation=validation)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in `path`; ValueError when the file is anything else or is cut short."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != bytes((0, 0, UNSIGNED_BYTE)):
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", count=rank, offset=4).tolist())
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, got {body.size}")
    return body.reshape(shape)
