"""Reads IDX files, the format in which MNIST and its successors are published (also gzip-compressed)."""

import gzip
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNSIGNED_BYTE = 0x08  # the third byte of the magic number says the element type; the fourth the number of dimensions


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
