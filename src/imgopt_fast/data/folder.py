"""Reads a class folder: one folder per class, images below it, with or without a split into train, val and test.

The folder may be a zip archive. Decoding runs in threads (Pillow releases the GIL) with JPEG's draft scaling, so a
large photo is decoded at the smallest of its eight built-in scales that still covers the wanted size.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from imgopt_fast.data.dataset import DataError, Dataset, Split, stable_fraction
from imgopt_fast.data.files import ImageFiles, list_images

DEFAULT_SIZE = 64  # pixels, for folders whose images differ in size
TEST_FRACTION = 0.1
GREY = ("1", "L", "I;16", "I;16B")  # modes without colours
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class Item(NamedTuple):
    """An image file: its name among the files, and the class that its folder names."""

    name: str
    class_name: str


class Header(NamedTuple):
    """What an image file says about itself: (width, height), and whether it has no colours."""

    size: tuple[int, int]
    grey: bool


def load_folder(root: Path, *, image_size: int | None, validation: float) -> Dataset:
    """The images of the class folder or zip archive `root` at `image_size`² pixels, RGB, or grey where every image is.

    `root` holds either one folder per class, or a folder `train` of them beside `val` and `test`. A split that is
    missing is taken from the training images by a stable hash of each file's name: a share `validation` for
    validation, a tenth for the test. Without `image_size` the images keep the size that they share, or get 64².

    Raises DataError for a folder or an image that cannot be read.
    """
    files = list_images(root)
    splits = _complete(root, _split(files.names), validation)
    class_names = tuple(sorted({item.class_name for items in splits.values() for item in items}))
    if len(class_names) < 2:
        raise DataError(f"{root}: expected a folder of images per class, two at least; found {len(class_names)}")
    items = [item for name in ("train", "validation", "test") for item in splits[name]]
    side = image_size or max(_header(files, items[0]).size)
    pixels, headers = _decode_all(files, items, side, side, channels=3)
    if image_size is None and len({header.size for header in headers}) > 1:
        pixels, _ = _decode_all(files, items, DEFAULT_SIZE, DEFAULT_SIZE, channels=3)
    if all(header.grey for header in headers):
        pixels = pixels[..., :1]
    ends = np.cumsum([len(splits[name]) for name in ("train", "validation", "test")])
    parts = [_labelled(pixels[a:b], items[a:b], class_names) for a, b in pairwise((0, *ends.tolist()))]
    return Dataset(root.stem, class_names, *parts)


def load_labelled(root: Path, class_names: Sequence[str], size: tuple[int, int], channels: int) -> Split:
    """The test images of the class folder or zip archive `root`, all of its images where it has no test split.

    At `size` (height, width), labelled by their place in `class_names`. Raises DataError for a folder or an image that
    cannot be read, and for a class that is not in `class_names`.
    """
    files = list_images(root)
    splits = _split(files.names)
    items = splits.get("test", splits["train"])
    if not items:
        raise DataError(f"{root}: expected a folder of images per class, found none")
    for item in items:
        if item.class_name not in class_names:
            raise DataError(f"{root}: the network has no class {item.class_name!r}, only {', '.join(class_names)}")
    pixels, _ = _decode_all(files, items, *size, channels=channels)
    return _labelled(pixels, items, class_names)


def decode(file: Path, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    """(height, width, channels) pixels of an image file, grey for one channel, RGB for three.

    Turned upright, scaled so that it just covers the size, cropped at the centre. Raises DataError.
    """
    with _opened(file, file) as image:
        return _pixels(image, height, width, channels)


def _split(names: Sequence[str]) -> dict[str, list[Item]]:
    """The images per split, all in `train` where the folders name no splits; a single top folder is skipped."""
    paths = {name: name.split("/")[:-1] for name in names}
    top = {path[0] if path else "" for path in paths.values()}
    if len(top) == 1 and SPLITS.keys().isdisjoint(top) and all(len(path) > 1 for path in paths.values()):
        paths = {name: path[1:] for name, path in paths.items()}
        top = {path[0] for path in paths.values()}
    if not SPLITS.keys().isdisjoint(top) and any(SPLITS.get(name) == "train" for name in top):
        found: dict[str, list[Item]] = {"train": []}
        for name, path in paths.items():
            if len(path) > 1 and path[0] in SPLITS:
                found.setdefault(SPLITS[path[0]], []).append(Item(name, path[1]))
        return found
    return {"train": [Item(name, path[0]) for name, path in paths.items() if path]}


def _complete(root: Path, splits: dict[str, list[Item]], validation: float) -> dict[str, list[Item]]:
    """With the missing splits taken from the training images."""
    shares = {"validation": validation, "test": TEST_FRACTION}
    missing = [name for name in shares if name not in splits]
    bounds = list(pairwise(np.cumsum([0.0, *(shares[name] for name in missing)]).tolist()))
    complete = splits | {"train": []} | {name: [] for name in missing}
    for item in splits["train"]:
        position = stable_fraction(item.name)
        taken = [name for name, (low, high) in zip(missing, bounds, strict=True) if low <= position < high]
        complete[taken[0] if taken else "train"].append(item)
    for name in ("train", "validation", "test"):
        if splits["train"] and not complete[name]:
            raise DataError(f"{root}: too few images, none for the {name} split")
    return complete


def _decode_all(
    files: ImageFiles, items: Sequence[Item], height: int, width: int, channels: int
) -> tuple[NDArray[np.uint8], list[Header]]:
    """(N, height, width, channels) pixels, and what the files' headers say."""
    pixels = np.empty((len(items), height, width, channels), np.uint8)

    def decode_one(i: int) -> Header:
        name = items[i].name
        with _opened(files.open(name), files.root / name) as image:
            header = Header(image.size, image.mode in GREY)
            pixels[i] = _pixels(image, height, width, channels)
        return header

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return pixels, list(pool.map(decode_one, range(len(items))))


def _header(files: ImageFiles, item: Item) -> Header:
    with _opened(files.open(item.name), files.root / item.name) as image:
        return Header(image.size, image.mode in GREY)


def _labelled(pixels: NDArray[np.uint8], items: Sequence[Item], class_names: Sequence[str]) -> Split:
    label_of = {name: label for label, name in enumerate(class_names)}
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Split(images, torch.tensor([label_of[item.class_name] for item in items]))


def _pixels(image: Image.Image, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    mode = "L" if channels == 1 else "RGB"
    image.draft(mode, (width, height))
    upright = ImageOps.exif_transpose(_eight_bits(image)).convert(mode)
    if upright.size != (width, height):
        upright = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    return np.array(upright, np.uint8).reshape(height, width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey values where it should scale them."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


@contextmanager
def _opened(file: Path | BytesIO, name: Path) -> Iterator[Image.Image]:
    """The image; whatever is wrong with it becomes one line that names the file."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: cannot read this image: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # Pillow repeats the path in some messages and says nothing in others.
    if isinstance(error, UnidentifiedImageError):
        return "not an image file, or damaged"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
