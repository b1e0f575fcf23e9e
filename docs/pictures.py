"""Draws docs/transforms.webp: every transform on one photo (the public-domain portrait that matplotlib ships).

python docs/pictures.py
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw, ImageFont, ImageOps

from imgopt_fast import affine_warp, augment
from imgopt_fast.augment import tables

SIDE, MARGIN, COLUMNS = 128, 4, 8
INDEX = 5  # the sample whose draws are shown

TRANSFORMS = (
    ("RandomHorizontalFlip()", augment.RandomHorizontalFlip(1.0)),
    ("RandomVerticalFlip()", augment.RandomVerticalFlip(1.0)),
    ("RandomRotation(30)", augment.RandomRotation((28, 30), "bilinear")),
    ("RandomAffine(20, ...)", augment.RandomAffine(20, (0.1, 0.1), (0.7, 1.1), 15, "bilinear", fill=(124, 116, 104))),
    ("RandomPerspective(0.5)", augment.RandomPerspective(0.5, p=1.0)),
    ("RandomCrop(padding=24)", augment.RandomCrop(SIDE, padding=24)),
    ("... padding_mode='reflect'", augment.RandomCrop(SIDE, padding=24, padding_mode="reflect")),
    ("RandomResizedCrop(128)", augment.RandomResizedCrop(SIDE, scale=(0.2, 0.4))),
    ("CenterCrop(80)", augment.CenterCrop(80)),
    ("Resize(64)", augment.Resize(64)),
    ("brightness 0.5", augment.ColorJitter(brightness=(0.5, 0.5))),
    ("brightness 1.5", augment.ColorJitter(brightness=(1.5, 1.5))),
    ("contrast 0.4", augment.ColorJitter(contrast=(0.4, 0.4))),
    ("contrast 1.8", augment.ColorJitter(contrast=(1.8, 1.8))),
    ("saturation 2", augment.ColorJitter(saturation=(2.0, 2.0))),
    ("hue 0.25", augment.ColorJitter(hue=(0.25, 0.25))),
    ("ColorJitter(0.5, ...)", augment.ColorJitter(0.5, 0.5, 0.5, 0.1)),
    ("RandomGrayscale()", augment.RandomGrayscale(1.0)),
    ("RandomErasing()", augment.RandomErasing(1.0)),
    ("... value='random'", augment.RandomErasing(1.0, value="random")),
    ("RandAugment(2, 12)", augment.RandAugment(2, 12, fill=(124, 116, 104))),
    ("TrivialAugmentWide()", augment.TrivialAugmentWide(fill=(124, 116, 104))),
)  # fmt: skip


def main() -> None:
    with get_sample_data("grace_hopper.jpg") as file:
        photo = ImageOps.fit(Image.open(file).convert("RGB"), (SIDE, SIDE), centering=(0.5, 0.2))
    images = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].contiguous()
    tiles = [("the photo", images)]
    tiles += [(name, transform(images, key=(1, 0, [INDEX]))) for name, transform in TRANSFORMS]
    for name, table in (
        ("posterize(2)", torch.from_numpy(tables.posterize(2)).expand(1, 3, 256)),
        ("solarize(128)", torch.from_numpy(tables.solarize(128)).expand(1, 3, 256)),
        ("invert()", torch.from_numpy(tables.invert()).expand(1, 3, 256)),
        ("equalize(images)", tables.equalize(images)),
        ("autocontrast(images)", tables.autocontrast(images)),
    ):
        tiles.append((name, affine_warp(images, torch.eye(3)[None, :2], interpolation="nearest", table=table)))
    tiles.append(("adjust_sharpness(images, 4)", augment.adjust_sharpness(images, 4.0)))
    tiles.append(("scale_color(images, ...)", augment.scale_color(images, (1.0, 0.8, 0.6))))
    pair = torch.cat([images.flip(2), images])  # a sample mixes with the one before it
    for name, mix in (("MixUp()", augment.MixUp(num_classes=2)), ("CutMix()", augment.CutMix(num_classes=2))):
        tiles.append((name, mix(pair, torch.arange(2), key=(2, 0, [0, INDEX]))[0][1:]))
    sheet(tiles).save(Path(__file__).with_name("transforms.webp"), quality=80)


def sheet(tiles: list[tuple[str, torch.Tensor]]) -> Image.Image:
    font, line = ImageFont.load_default(9), 14
    rows = -(-len(tiles) // COLUMNS)
    result = Image.new("RGB", (COLUMNS * (SIDE + MARGIN) + MARGIN, rows * (SIDE + line + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(result)
    for i, (name, images) in enumerate(tiles):
        x, y = MARGIN + i % COLUMNS * (SIDE + MARGIN), MARGIN + i // COLUMNS * (SIDE + line + MARGIN)
        result.paste(Image.fromarray(images[0].permute(1, 2, 0).contiguous().numpy()), (x, y))
        pen.text((x, y + SIDE + 1), name, "black", font)
    return result


if __name__ == "__main__":
    main()
