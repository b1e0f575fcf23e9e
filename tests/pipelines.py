"""Images and a training recipe for the tests of the augmentation pipeline."""

import torch

from imgopt_fast.augment import (
    ColorJitter,
    Compose,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
)

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def photos(n: int = 6, channels: int = 3, height: int = 20, width: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def training_recipe() -> Compose:
    return Compose(
        [
            RandomCrop((20, 24), padding=3),
            RandomHorizontalFlip(),
            RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 5, interpolation="bilinear"),
            ColorJitter(0.4, 0.4, 0.4),
            RandomGrayscale(0.3),
            Normalize(MEAN, STD),
        ]
    )
