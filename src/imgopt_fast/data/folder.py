"""Reads a class folder: one folder per class, images below it, with or without a split into train, val and test.

The folder may be a zip or tar archive. An image that cannot be read is left out and named in the result.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.data.cache import decoded
from imgopt_fast.data.dataset import PARTS, DataError, Dataset, Parts, Skipped, Split, parts_of, stable_fraction
from imgopt_fast.data.decode import Header, UnreadableError, bombs_handled, read_header
from imgopt_fast.data.files import ImageFiles, list_images

DEFAULT_SIZE = 64  # pixels, for folders whose images differ in size
PROBES = 16  # images whose headers are read before all are decoded
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


class Item(NamedTuple):
    """An image file: its name among the files, the class that its folder names, and its name in the set.

    The latter is without a top folder that holds all of the set, as archives often have: packing moves no image from
    one split to another.
    """

    name: str
    class_name: str
    place: str


def load_folder(root: Path, *, image_size: int | None, validation: float) -> Dataset:
    """The images of the class folder or archive `root` at `image_size`² pixels, RGB, or grey where every image is.

    `root` holds either one folder per class, or a folder `train` of them beside `val` and `test`. A split that is
    missing is taken from the training images by a stable hash of each file's name: a share `validation` for
    validation, a tenth for the test; `val` without `test` is the test. Without `image_size` the images keep the size
    that they share, or get 64².

    Images that cannot be read are in the result's `skipped`. Raises DataError for a folder that cannot be read, and
    where too few images are left.
    """
    files = list_images(root)
    given = _split(files.names)
    parts = parts_of(given, validation)
    splits = _complete(root, {parts.role[name]: items for name, items in given.items()}, parts)
    items = [item for part in PARTS for item in splits[part]]
    if len({item.class_name for item in items}) < 2:
        found = len({item.class_name for item in items})
        raise DataError(f"{root}: expected a folder of images per class, two at least; found {found}")
    names = [item.name for item in items]
    side = image_size or _shared_side(files, names)
    images = decoded(files, names, (side, side, 3))
    if image_size is None and not images.same_size and side != DEFAULT_SIZE:
        images = decoded(files, names, (DEFAULT_SIZE, DEFAULT_SIZE, 3))
    unreadable = {skipped.name for skipped in images.skipped}
    for part in PARTS:
        splits[part] = [item for item in splits[part] if item.name not in unreadable]
    class_names = tuple(sorted({item.class_name for part in PARTS for item in splits[part]}))
    if len(class_names) < 2 or not all(splits.values()):
        raise _unusable(root, images.skipped)
    pixels = images.pixels[..., :1] if images.grey else images.pixels
    ends = np.cumsum([len(splits[part]) for part in PARTS])
    bounds = pairwise((0, *ends.tolist()))
    train, held_out, test = (
        _labelled(pixels[a:b], splits[part], class_names, resident=not images.mapped)
        for part, (a, b) in zip(PARTS, bounds, strict=True)
    )
    return Dataset(root.stem, class_names, train, held_out, test, tuple(images.skipped), parts.about)


def load_labelled(
    root: Path, class_names: Sequence[str], size: tuple[int, int], channels: int
) -> tuple[Split, tuple[Skipped, ...]]:
    """The test images of the class folder or archive `root`, else those of `val`, else all of its images.

    At `size` (height, width), labelled by their place in `class_names`; beside them what could not be read. Raises
    DataError for a folder that cannot be read, and for a class that is not in `class_names`.
    """
    files = list_images(root)
    splits = _split(files.names)
    items = splits.get("test", splits.get("validation", splits["train"]))
    if not items:
        raise DataError(f"{root}: expected a folder of images per class, found none")
    for item in items:
        if item.class_name not in class_names:
            raise DataError(f"{root}: the network has no class {item.class_name!r}, only {', '.join(class_names)}")
    images = decoded(files, [item.name for item in items], (*size, channels))
    unreadable = {skipped.name for skipped in images.skipped}
    items = [item for item in items if item.name not in unreadable]
    if not items:
        raise _unusable(root, images.skipped)
    return _labelled(images.pixels, items, class_names, resident=not images.mapped), tuple(images.skipped)


def _unusable(root: Path, skipped: Sequence[Skipped]) -> DataError:
    first = f"{root / skipped[0].name}: {skipped[0].reason}"
    return DataError(f"{root}: {len(skipped)} images cannot be read and too few are left; the first is {first}")


def _split(names: Sequence[str]) -> dict[str, list[Item]]:
    """The images per split, all in `train` where the folders name no splits; a single top folder is skipped."""
    paths = {name: name.split("/") for name in names}
    top = _top_folders(paths.values())
    if len(top) == 1 and SPLITS.keys().isdisjoint(top) and all(len(path) > 2 for path in paths.values()):
        paths = {name: path[1:] for name, path in paths.items()}
        top = _top_folders(paths.values())
    split_by_folder = any(SPLITS.get(name) == "train" for name in top)
    found: dict[str, list[Item]] = {"train": []}
    for name, path in paths.items():
        folders = path[1:-1] if split_by_folder else path[:-1]
        part = SPLITS.get(path[0]) if split_by_folder else "train"
        if part and folders:
            found.setdefault(part, []).append(Item(name, folders[0], "/".join(path)))
    return found


def _top_folders(paths: Iterable[Sequence[str]]) -> set[str]:
    """The first folders on the way to the files; "" for a file in none."""
    return {path[0] if len(path) > 1 else "" for path in paths}


def _complete(root: Path, splits: dict[str, list[Item]], parts: Parts) -> dict[str, list[Item]]:
    """With the missing splits taken from the training images."""
    complete = splits | {"train": []} | {name: [] for name in parts.taken}
    for item in splits["train"]:
        position = stable_fraction(item.place)
        taken = [name for name, (low, high) in parts.taken.items() if low <= position < high]
        complete[taken[0] if taken else "train"].append(item)
    for name in PARTS:
        if splits["train"] and not complete[name]:
            raise DataError(f"{root}: too few images, none for the {name} split")
    return complete


def _shared_side(files: ImageFiles, names: Sequence[str]) -> int:
    """The longer side that some images, far apart in the list, have in common; DEFAULT_SIZE where they differ."""
    found: set[Header] = set()
    with bombs_handled():
        for name in names[:: max(1, len(names) // PROBES)]:
            try:
                found.add(read_header(files.read(name)))
            except (UnreadableError, OSError):
                continue
    sizes = {header.size for header in found}
    return max(sizes.pop()) if len(sizes) == 1 else DEFAULT_SIZE


def _labelled(pixels: NDArray[np.uint8], items: Sequence[Item], class_names: Sequence[str], *, resident: bool) -> Split:
    label_of = {name: label for label, name in enumerate(class_names)}
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return Split(images, torch.tensor([label_of[item.class_name] for item in items]), resident)
