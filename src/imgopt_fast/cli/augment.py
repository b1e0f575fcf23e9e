"""`imgopt-fast augment`: a contact sheet of images and what the augmentations make of them, with the parameters."""

from __future__ import annotations

import argparse
import ast
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from imgopt_fast.augment import Transform

RECIPE = (
    "RandomResizedCrop({size}, scale=(0.5, 1.0))",
    "RandomHorizontalFlip()",
    "RandomAffine(15, shear=5, interpolation='bilinear')",
    "ColorJitter(0.3, 0.3, 0.3, 0.05)",
)
EXAMPLES = """examples:
  imgopt-fast augment photos/ --out sheet.png
  imgopt-fast augment cat.jpg dog.jpg --out sheet.png --draws 8 --transform "RandAugment(2, 9)"
  imgopt-fast augment cat.jpg --out sheet.png -t "RandomCrop(160, padding=20)" -t "ColorJitter(hue=0.2)"
"""

_MARGIN = 6
_LINE = 13  # pixels from one line of a caption to the next
_CHARACTER = 5.6  # mean width of one at font size 10
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "augment",
        help="draw a contact sheet of augmented images",
        description="Draw a sheet with one row per image: the original, and what it becomes in each of several epochs "
        "of training, with the parameters that were drawn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the sheet: .png, .jpg, .webp, ...")
    parser.add_argument(
        "-t", "--transform", action="append", metavar="CALL",
        help="a class of imgopt_fast.augment with its arguments; repeat it for a pipeline "
        "(default: crop, flip, affine, colour)",
    )  # fmt: skip
    parser.add_argument("--draws", type=int, default=5, help="epochs to show (default: %(default)s)")
    parser.add_argument("--count", type=int, default=6, help="most images to take of a folder (default: %(default)s)")
    parser.add_argument("--size", type=int, default=160, help="side of the square images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    for name, least in (("draws", 1), ("count", 1), ("size", 16)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(arguments, name)}")
    import numpy as np
    import torch
    from PIL import Image

    from imgopt_fast.augment import Compose

    if arguments.out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out: expected a file name that ends in .png, .jpg or .webp, got {arguments.out}")
    if not arguments.out.absolute().parent.is_dir():
        raise ValueError(f"--out: no such folder: {arguments.out.parent}")
    calls = arguments.transform or [call.format(size=arguments.size) for call in RECIPE]
    pipeline = Compose([parse_transform(call) for call in calls])
    paths = _image_files(arguments.images, arguments.count)
    pixels = np.stack([_read(path, arguments.size) for path in paths])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    columns = [[(_as_picture(image), path.name) for image, path in zip(images, paths, strict=True)]]
    for epoch in range(arguments.draws):
        params = pipeline.make_params(images, key=(arguments.seed, epoch, range(len(images))))
        result = pipeline.transform(images, params)
        columns.append([(_as_picture(image), params.describe(i)) for i, image in enumerate(result)])
    titles = ["original", *(f"epoch {epoch}" for epoch in range(arguments.draws))]
    _save(_sheet(titles, columns), arguments.out)
    print(f"{arguments.out}: {len(paths)} images, {arguments.draws} draws of {', '.join(calls)}")
    return 0


def parse_transform(call: str) -> Transform:
    """The transform that `call`, such as `RandomAffine(15, scale=(0.8, 1.2))`, constructs; literals only."""
    from imgopt_fast import augment

    classes = {name: getattr(augment, name) for name in augment.__all__ if isinstance(getattr(augment, name), type)}
    known = {
        name: kind
        for name, kind in classes.items()
        if issubclass(kind, augment.Transform) and kind not in (augment.Transform, augment.Compose)
    }
    try:
        node = ast.parse(call.strip(), mode="eval").body
        function = node.func if isinstance(node, ast.Call) else node
        if not isinstance(function, ast.Name) or function.id not in known:
            raise ValueError(f"expected a call of one of {', '.join(known)}")
        positional: list[Any] = []
        named: dict[str, Any] = {}
        if isinstance(node, ast.Call):
            positional = [ast.literal_eval(argument) for argument in node.args]
            named = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in node.keywords}
        transform: Transform = known[function.id](*positional, **named)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"--transform {call}: {error}") from None
    return transform


def _image_files(paths: Sequence[Path], count: int) -> list[Path]:
    from imgopt_fast.data.files import SUFFIXES

    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)[:count]
            if not inside:
                raise ValueError(f"{path}: no images in this folder")
            found += inside
        else:
            found.append(path)
    return found


def _read(path: Path, size: int) -> Any:
    """The middle square of an image, (size, size, 3) uint8."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow can read") from None
    return np.array(ImageOps.fit(upright, (size, size)))


def _as_picture(image: torch.Tensor) -> Image.Image:
    import torch
    from PIL import Image

    if image.dtype != torch.uint8:  # normalised: stretched over the full range, to be seen at all
        low, high = image.min(), image.max()
        image = ((image.float() - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _sheet(titles: list[str], columns: list[list[tuple[Image.Image, str]]]) -> Image.Image:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(10)
    widths = [max(picture.width for picture, _ in column) for column in columns]
    captions = [
        [_wrapped(caption, width) for _, caption in column] for column, width in zip(columns, widths, strict=True)
    ]
    heights = [
        max(column[row][0].height for column in columns) + _LINE * max(len(lines[row]) for lines in captions) + _MARGIN
        for row in range(len(columns[0]))
    ]
    sheet = Image.new("RGB", (sum(widths) + _MARGIN * (len(widths) + 1), sum(heights) + 2 * _MARGIN + _LINE), _PAPER)
    pen = ImageDraw.Draw(sheet)
    x = _MARGIN
    for title, column, lines, width in zip(titles, columns, captions, widths, strict=True):
        pen.text((x, _MARGIN // 2), title, _INK, font)
        y = _MARGIN + _LINE
        for (picture, _), caption, height in zip(column, lines, heights, strict=True):
            sheet.paste(picture, (x, y))
            for i, line in enumerate(caption):
                pen.text((x, y + picture.height + 1 + _LINE * i), line, _INK, font)
            y += height
        x += width + _MARGIN
    return sheet


def _wrapped(caption: str, width: int) -> list[str]:
    """The name of each transform on a line, its parameters on those below."""
    characters = max(8, int(width / _CHARACTER))
    lines = []
    for part in caption.split("  "):
        name, _, values = part.partition("(")
        lines += [name, *textwrap.wrap(values[:-1], characters, initial_indent=" ", subsequent_indent=" ")]
    return lines


def _save(sheet: Image.Image, path: Path) -> None:
    """Written beside its place first, so that no half of a sheet is left behind."""
    partial = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        sheet.save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
