"""Every bad argument of the augmentations is named by the error it raises."""

import numpy as np
import pytest
import torch
from pipelines import photos

from imgopt_fast import augment
from imgopt_fast.augment import (
    CenterCrop,
    ColorJitter,
    Compose,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomHorizontalFlip(1.5), "p: expected"),
        (lambda: RandomHorizontalFlip(float("nan")), "p: expected"),
        (lambda: RandomAffine(float("inf")), "degrees: expected a finite number"),
        (lambda: RandomAffine(3, scale=(1.0, float("nan"))), "scale: expected a finite number"),
        (lambda: augment.scale_color(photos()[0], 2.0), "images: expected"),
        (lambda: RandomAffine(-1), "degrees"),
        (lambda: RandomAffine((3, 1)), "degrees"),
        (lambda: RandomAffine(3, (0.1, 1.2)), "translate"),
        (lambda: RandomAffine(3, scale=(0, 1)), "scale"),
        (lambda: RandomAffine(3, shear=(1, 2, 3)), "shear"),
        (lambda: RandomAffine(3, interpolation="cubic"), "interpolation"),
        (lambda: RandomRotation(3, expand=True, center=(1, 1)), "expand, center"),
        (lambda: RandomCrop(0), "size"),
        (lambda: RandomCrop(3, padding=(1, 2, 3)), "padding"),
        (lambda: RandomCrop(3, padding_mode="wrap"), "padding_mode"),
        (lambda: RandomResizedCrop(3, scale=(0.5, 0.1)), "scale"),
        (lambda: Resize((3, 4), max_size=9), "max_size"),
        (lambda: Resize(0), "size"),
        (lambda: Resize(None, max_size=0), "max_size"),
        (lambda: Resize(None), "size, max_size"),
        (lambda: ColorJitter(-1), "brightness"),
        (lambda: ColorJitter(contrast=(-1, 1)), "contrast"),
        (lambda: ColorJitter(hue=0.6), "hue"),
        (lambda: Normalize([0.5], [0.5, 0.5]), "mean, std"),
        (lambda: Normalize([0.5], [0.0]), "std"),
        (lambda: RandomCrop(30)(photos()), "larger than the padded image"),
        (lambda: RandomHorizontalFlip()(torch.zeros(2, 2)), "images"),
        (lambda: RandomHorizontalFlip()(np.zeros(3)), "images"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2)), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2.5, range(6))), "key: expected integers"),
        (lambda: RandomHorizontalFlip()(photos(), key=("a", 2, range(6))), "key: expected integers"),
        (lambda: CenterCrop(("a", 3)), "size"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, range(5))), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, [0.5] * 6)), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, range(6)), generator=torch.Generator()), "generator, key"),
    ],
)
def test_bad_values_name_the_argument(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomHorizontalFlip("often"), "p: expected a number"),
        (lambda: RandomAffine("much"), "degrees: expected"),
        (lambda: RandomAffine(3, scale=1.5), "scale: expected two numbers"),
        (lambda: RandomAffine(3, fill=["black"]), "fill: expected a number"),
        (lambda: RandomResizedCrop(None), "size: expected"),
        (lambda: RandomResizedCrop(8, ratio=("a", "b")), "ratio: expected a number"),
        (lambda: CenterCrop(2.5), "size: expected"),
        (lambda: ColorJitter("bright"), "brightness: expected"),
        (lambda: RandAugment()(photos().float() / 255), "images: expected uint8"),
        (lambda: RandAugment(num_ops=1.5), "num_ops: expected an integer"),
        (lambda: RandAugment(magnitude="strong"), "magnitude: expected an integer"),
        (lambda: Resize("large"), "size: expected"),
        (lambda: Normalize(0.5, 0.5), "mean: expected one number per channel"),
        (lambda: Normalize([0.5], ["a"]), "std: expected a number"),
        (lambda: RandomErasing()(photos().int()), "images: expected uint8 or a floating dtype"),
        (lambda: RandomErasing()(np.zeros((4, 4, 3), np.int64)), "images: expected uint8 or a floating dtype"),
        (lambda: RandomVerticalFlip()(photos(), generator=5), "generator: expected a torch.Generator"),
        (lambda: augment.MixUp(alpha="a"), "alpha: expected a number"),
        (lambda: augment.CutMix(num_classes=2.5), "num_classes: expected an integer"),
        (lambda: augment.rgb_to_hsv(photos()), "images: expected a floating dtype"),
        (lambda: augment.scale_color(photos().int(), 2.0), "images: expected uint8"),
    ],
)
def test_wrong_types_name_the_argument(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_bad_types_name_the_argument():
    with pytest.raises(TypeError, match="images"):
        RandomHorizontalFlip()([1, 2])
    with pytest.raises(TypeError, match="transforms"):
        Compose([torch.nn.ReLU()])
    with pytest.raises(TypeError, match="dtype"):
        Normalize([0.5], [0.5], dtype=torch.uint8)


def test_numbers_of_numpy_are_numbers():
    images = photos()
    ours = RandomAffine(np.float32(10), fill=np.uint8(7))(images, key=(np.int64(3), np.uint8(1), range(6)))
    assert torch.equal(ours, RandomAffine(10.0, fill=7.0)(images, key=(3, 1, range(6))))
    assert CenterCrop(np.int64(5))(images).shape[2:] == (5, 5)
