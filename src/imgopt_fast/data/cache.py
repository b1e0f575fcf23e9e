"""Many images decoded at once, in threads or processes, into memory or a file that later trainings map into theirs.

A set of LEAST_BYTES and more goes to the cache folder: one file of raw pixels that the system pages in and out as
memory allows, and one that describes it. It is built once for a version of the files, a size and a number of channels.
60,000 CIFAR images as JPEG: decoded in 2 s (simplejpeg, two threads), mapped in a few milliseconds.
"""

import fcntl
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.data.dataset import DataError, Skipped
from imgopt_fast.data.decode import DECODER, Header, UnreadableError, bombs_handled, decode_into
from imgopt_fast.data.files import ImageFiles

LEAST_BYTES = 32 << 20  # smaller sets decode in less than a second
FORMAT = 1  # of the two files
CHUNK = 256  # images per task of a thread or process

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
    _remove_abandoned(place.parent)
    partial = place.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
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


def _remove_abandoned(folder: Path) -> None:
    """Delete what a killed process left half built: nobody holds its lock any more."""
    for left in folder.glob("*.partial"):
        with suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def _decode_all(files: ImageFiles, names: Sequence[str], pixels: NDArray[np.uint8]) -> Decoded:
    """Decode into `pixels`; the rows of what cannot be read are closed up."""
    headers = [entry for some in _decoded_chunks(Job(files, names, pixels)) for entry in some]
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


@dataclass(frozen=True)
class Job:
    """What the threads or processes decode together."""

    files: ImageFiles
    names: Sequence[str]
    pixels: NDArray[np.uint8]


def _decoded_chunks(job: Job) -> Iterator[list[Header | Skipped]]:
    """Decode by chunks, in threads; in processes where the interpreter's lock would let one thread at a time decode.

    simplejpeg lets go of the lock. Pillow does for the pixels only, not for its own work on each file. The processes
    are forks, which see the job and write into the mapped file; they touch neither torch nor its threads.
    """
    begins = range(0, len(job.names), CHUNK)
    jpegs = sum(name.lower().endswith((".jpg", ".jpeg")) for name in job.names)
    locked = DECODER == "Pillow" or jpegs < len(job.names) / 2
    with bombs_handled():
        if not (locked and isinstance(job.pixels, np.memmap) and sys.platform == "linux" and len(begins) > 1):
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                yield from threads.map(partial(_decode_chunk, job), begins)
            return
        for kind in (DeprecationWarning, RuntimeWarning):  # of forks beside threads: Python's from 3.12 on, and JAX's
            warnings.simplefilter("ignore", kind)
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork"), _take, (job,)) as processes:
            try:
                yield from processes.map(_decode_chunk_of_taken, begins)
            except BrokenProcessPool as error:
                raise DataError(f"{job.files.root}: a process that decoded its images was killed") from error


_taken: list[Job] = []  # in a process that decodes: its one job


def _take(job: Job) -> None:
    _taken.append(job)


def _decode_chunk_of_taken(begin: int) -> list[Header | Skipped]:
    return _decode_chunk(_taken[0], begin)


def _decode_chunk(job: Job, begin: int) -> list[Header | Skipped]:
    some = range(begin, min(begin + CHUNK, len(job.names)))
    return [_decode_one(job.files, job.names[i], job.pixels[i]) for i in some]


def _decode_one(files: ImageFiles, name: str, pixels: NDArray[np.uint8]) -> Header | Skipped:
    try:
        return decode_into(files.read(name), pixels)
    except UnreadableError as error:
        return Skipped(name, str(error))
    except (OSError, DataError) as error:
        return Skipped(name, getattr(error, "strerror", None) or str(error))
