"""Reads a class folder: one folder per class, images below it, with or without a split into train, val and test.

Decoding runs in threads (Pillow releases the GIL) with JPEG's draft scaling, so a large photo is decoded at the
smallest of its eight built-in scales that still covers the wanted size.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from imgopt_fast.data.dataset import DataError, Dataset, Split, stable_fraction

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
DEFAULT_SIZE = 64  # pixels, for folders whose images differ in size
TEST_FRACTION = 0.1
SPLITS = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test",)}


def load_folder(root: Path, *, image_size: int | None, validation: float) -> Dataset:
    """The images below `root` at `image_size`² pixels, RGB, or grey where every image is.

    `root` holds either one folder per class, or a folder `train` of them beside `val` and `test`. A split that is
    missing is taken from the training images by a stable hash of each file's path: a share `validation` for
    validation, a tenth for the test. Without `image_size` the images keep the size that they share, or get 64².

    Raises DataError for a folder or an image that cannot be read.
    """
    found = _find_splits(root)
    class_names = tuple(sorted({name for paths in found.values() for name, _ in paths}))
    if len(class_names) < 2:
        raise DataError(f"{root}: expected a folder of images per class, two at least; found {len(class_names)}")
    _complete(root, found, validation)
    paths = [path for split in found.values() for _, path in split]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        headers = list(pool.map(_header, paths))
        sizes = {size for size, _ in headers}
        channels = 1 if all(grey for _, grey in headers) else 3
        side = image_size or (max(sizes.pop()) if len(sizes) == 1 else DEFAULT_SIZE)
        pixels = list(pool.map(lambda path: decode(path, side, side, channels), paths))
    return Dataset(root.name, class_names, *_splits(found, class_names, pixels))


def load_labelled(root: Path, class_names: Sequence[str], size: tuple[int, int], channels: int) -> Split:
    """All images of the class folder `root` at `size` (height, width), labelled by their place in `class_names`.

    Raises DataError for a folder or an image that cannot be read, and for a class that is not in `class_names`.
    """
    label_of = {name: label for label, name in enumerate(class_names)}
    try:
        found = _images_below(root)
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error
    if not found:
        raise DataError(f"{root}: expected a folder of images per class, found none")
    for name, path in found:
        if name not in label_of:
            raise DataError(f"{path.parent}: the network has no class {name!r}, only {', '.join(class_names)}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels = list(pool.map(lambda item: decode(item[1], *size, channels), found))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return Split(images, torch.tensor([label_of[name] for name, _ in found]))


def _find_splits(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """(class name, path) of each image, per split, sorted: the order of a directory listing is not defined."""
    try:
        folders = {entry.name: entry for entry in root.iterdir() if entry.is_dir()}
        named = {split: folders[name] for split, names in SPLITS.items() for name in names if name in folders}
        if "train" not in named:
            named = {"train": root}
        return {split: _images_below(folder) for split, folder in named.items()}
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from error


def _images_below(folder: Path) -> list[tuple[str, Path]]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [(c.name, path) for c in classes for path in sorted(c.rglob("*")) if path.suffix.lower() in SUFFIXES]


def _complete(root: Path, found: dict[str, list[tuple[str, Path]]], validation: float) -> None:
    """Take the missing splits from the training images."""
    missing = [
        (name, share) for name, share in (("validation", validation), ("test", TEST_FRACTION)) if name not in found
    ]
    bounds = np.cumsum([0.0, *(share for _, share in missing)])
    remaining = []
    for name, _ in missing:
        found[name] = []
    for item in found["train"]:
        position = stable_fraction(item[1].relative_to(root).as_posix())
        for (name, _), (low, high) in zip(missing, pairwise(bounds), strict=True):
            if low <= position < high:
                found[name].append(item)
                break
        else:
            remaining.append(item)
    found["train"] = remaining
    for name, items in found.items():
        if not items:
            raise DataError(f"{root}: too few images, none for the {name} split")


def _header(path: Path) -> tuple[tuple[int, int], bool]:
    """Size and whether the image is grey, from the file's header."""
    with _opened(path) as image:
        return image.size, image.mode in ("1", "L")


def decode(path: Path, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """(height, width, channels) pixels of an image file, grey for one channel, RGB for three.

    Turned upright, scaled so that it just covers the size, cropped at the centre. Raises DataError.
    """
    mode = "L" if channels == 1 else "RGB"
    with _opened(path) as image:
        image.draft(mode, (width, height))
        upright = ImageOps.exif_transpose(_eight_bits(image)).convert(mode)
        if upright.size != (width, height):
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
        return np.array(upright, np.uint8).reshape(height, width, channels)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image; whatever goes wrong with it becomes one line that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot read this image: {_reason(error)}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey values where it should scale them."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _reason(error: Exception) -> str:
    # Pillow repeats the path in some messages and says nothing in others.
    if isinstance(error, UnidentifiedImageError):
        return "not an image file, or damaged"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _splits(
    found: dict[str, list[tuple[str, Path]]], class_names: Sequence[str], pixels: list[NDArray[np.uint8]]
) -> tuple[Split, Split, Split]:
    label_of = {name: label for label, name in enumerate(class_names)}
    begin, splits = 0, {}
    for split, items in found.items():
        images = torch.from_numpy(np.stack(pixels[begin : begin + len(items)])).permute(0, 3, 1, 2)
        splits[split] = Split(images, torch.tensor([label_of[name] for name, _ in items]))
        begin += len(items)
    return splits["train"], splits["validation"], splits["test"]
