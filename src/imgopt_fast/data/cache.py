"""Many images decoded at once, in threads, into memory or into a file that later trainings map into theirs.

A set of LEAST_BYTES and more goes to the cache folder: one file of raw pixels that the system pages in and out as
memory allows, and one that describes it. It is built once for a version of the files, a size and a number of channels.
60,000 CIFAR images as JPEG: decoded in 1 to 6 s, mapped in a few milliseconds.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.data.dataset import DataError, Skipped
from imgopt_fast.data.decode import DECODER, Header, UnreadableError, bombs_handled, decode_into
from imgopt_fast.data.files import ImageFiles

LEAST_BYTES = 32 << 20  # smaller sets decode in less than a second
FORMAT = 1  # of the two files
CHUNK = 256  # images per task of a thread

logger = logging.getLogger("imgopt_fast")


@dataclass
class Decoded:
    """(N, H, W, C) `pixels` of the images that could be read, in the order of their names.

    `mapped`: whether they lie in a file. `grey`: no image has colours. `same_size`: all had one size.
    """

    pixels: NDArray[np.uint8]
    mapped: bool = False
    grey: bool = True
    same_size: bool = True
    skipped: list[Skipped] = field(default_factory=list)


def cache_folder() -> Path:
    """IMGOPT_CACHE, or imgopt_fast in the user's cache folder."""
    if "IMGOPT_CACHE" in os.environ:
        return Path(os.environ["IMGOPT_CACHE"])
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", default)) / "imgopt_fast"


def decoded(files: ImageFiles, names: Sequence[str], shape: tuple[int, int, int]) -> Decoded:
    """The images `names` at `shape` (height, width, channels), from the cache where they are there already."""
    if len(names) * int(np.prod(shape)) < LEAST_BYTES:
        return _decode_all(files, names, np.empty((len(names), *shape), np.uint8))
    identity = json.dumps([FORMAT, DECODER, files.version(), list(names), shape])
    place = cache_folder() / sha256(identity.encode()).hexdigest()[:24]
    found = _mapped(place, shape)
    if found is not None:
        return found
    try:
        return _build(place, files, names, shape)
    except OSError as error:
        logger.warning(f"{place.parent}: cannot keep the decoded images: {error.strerror}; they stay in memory")
        return _decode_all(files, names, np.empty((len(names), *shape), np.uint8))


def _mapped(place: Path, shape: tuple[int, int, int]) -> Decoded | None:
    try:
        about = json.loads(place.with_suffix(".json").read_text())
        skipped = [Skipped(*entry) for entry in about["skipped"]]
        pixels = np.memmap(place.with_suffix(".pixels"), np.uint8, "c", shape=(about["count"], *shape))
    except (OSError, ValueError, KeyError):  # not there, or half of it
        return None
    return Decoded(pixels, True, about["grey"], about["same_size"], skipped)


def _build(place: Path, files: ImageFiles, names: Sequence[str], shape: tuple[int, int, int]) -> Decoded:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            # Memory mapped from a file with holes would kill the process where the disk is full.
            os.posix_fallocate(file.fileno(), 0, len(names) * int(np.prod(shape)))
        result = _decode_all(files, names, np.memmap(partial, np.uint8, "r+", shape=(len(names), *shape)))
        about = {"count": len(result.pixels)} | {k: v for k, v in vars(result).items() if k not in ("pixels", "mapped")}
        partial.replace(place.with_suffix(".pixels"))
        partial.write_text(json.dumps(about))
        partial.replace(place.with_suffix(".json"))  # from now on the two belong together
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return _mapped(place, shape) or result


def _decode_all(files: ImageFiles, names: Sequence[str], pixels: NDArray[np.uint8]) -> Decoded:
    """Decode into `pixels`; the rows of what cannot be read are closed up."""
    headers: list[Header | Skipped] = []

    def decode_some(begin: int) -> list[Header | Skipped]:
        return [_decode_one(files, names[i], pixels[i]) for i in range(begin, min(begin + CHUNK, len(names)))]

    with bombs_handled(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in pool.map(decode_some, range(0, len(names), CHUNK)):
            headers += some
    skipped = [entry for entry in headers if isinstance(entry, Skipped)]
    whole = [entry for entry in headers if isinstance(entry, Header)]
    if skipped:
        kept = [i for i, entry in enumerate(headers) if isinstance(entry, Header)]
        for to, origin in enumerate(kept):
            if to != origin:
                pixels[to] = pixels[origin]
        pixels = pixels[: len(kept)]
    sizes = {header.size for header in whole}
    return Decoded(pixels, False, all(header.grey for header in whole), len(sizes) <= 1, skipped)


def _decode_one(files: ImageFiles, name: str, pixels: NDArray[np.uint8]) -> Header | Skipped:
    try:
        return decode_into(files.read(name), pixels)
    except UnreadableError as error:
        return Skipped(name, str(error))
    except (OSError, DataError) as error:
        return Skipped(name, getattr(error, "strerror", None) or str(error))
