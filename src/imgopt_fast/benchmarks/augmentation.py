"""A whole augmentation pipeline against albumentations, kornia and torch: the cases that end affine_warp's."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import ClassVar

import torch
from torch.nn import functional as F

from imgopt_fast import augment
from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work
from imgopt_fast.benchmarks.warp_inputs import BILINEAR_FLOPS, MEAN, STD, photographs


@dataclass(eq=False)
class PipelineCase(Case):
    """Flip, rotation and scale, brightness, contrast and saturation, normalisation: uint8 images to float32 NCHW.

    Everyone draws his own parameters, so what has to agree is the mean and the deviation of each channel.
    """

    subject: ClassVar[str] = "affine_warp"
    name: str
    batch: int
    side: int
    goals: Mapping[str, float]
    quick: bool = False

    degrees: ClassVar[float] = 30.0
    scale: ClassVar[tuple[float, float]] = (0.8, 1.2)
    jitter: ClassVar[float] = 0.2
    # Sixty-four draws; a channel that is wrong in scale, offset or order is off by more.
    agreement: ClassVar[Agreement] = Agreement(0.15)

    @cached_property
    def images(self) -> torch.Tensor:
        return photographs(self.batch, 3, self.side)

    def work(self) -> Work:
        # The warp, and a colour matrix of nine multiply-adds per pixel.
        pixels = self.batch * self.side**2
        return Work(float((BILINEAR_FLOPS + 18) * pixels), bytes_read=3 * pixels, bytes_written=12 * pixels)

    def ours(self) -> Runner:
        pipeline = augment.Compose(
            [
                augment.RandomHorizontalFlip(),
                augment.RandomAffine(self.degrees, scale=self.scale, interpolation="bilinear"),
                augment.ColorJitter(self.jitter, self.jitter, self.jitter),
                augment.Normalize(MEAN, STD),
            ]
        )
        images, generator = self.images, torch.Generator().manual_seed(5)
        return Runner(lambda: pipeline(images, generator=generator), result=moments)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch, "albumentations": self.with_albumentations, "kornia": self.with_kornia}

    def with_torch(self) -> Runner:
        """The same by hand: a matrix per sample for the geometry, another for the colour."""
        images, generator = self.images, torch.Generator().manual_seed(6)
        mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
        grey = torch.tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)

        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(self.batch, 1, 1, 1, generator=generator)

        def call() -> torch.Tensor:
            angle, scale = uniform(-1, 1) * math.radians(self.degrees), 1 / uniform(*self.scale)
            mirror = 1 - 2 * (uniform(0, 1) < 0.5).float()
            zero = torch.zeros_like(angle)
            rows = [mirror * scale * angle.cos(), -scale * angle.sin(), zero]
            rows += [mirror * scale * angle.sin(), scale * angle.cos(), zero]
            theta = torch.cat(rows, dim=1).view(-1, 2, 3)
            pixels = images.float().div_(255)
            grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
            pixels = F.grid_sample(pixels, grid, align_corners=False)
            around = 1 - self.jitter, 1 + self.jitter
            pixels = pixels.mul_(uniform(*around)).clamp_(0, 1)
            level = (pixels * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
            pixels = torch.lerp(level, pixels, uniform(*around)).clamp_(0, 1)
            luma = (pixels * grey).sum(1, keepdim=True)
            return torch.lerp(luma, pixels, uniform(*around)).clamp_(0, 1).sub_(mean).div_(std)

        return Runner(call, self.agreement, moments)

    def with_albumentations(self) -> Runner:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks a server for news at import
        library = import_module("albumentations")
        to_tensor = import_module("albumentations.pytorch").ToTensorV2
        jitter = (1 - self.jitter, 1 + self.jitter)
        pipeline = library.Compose(
            [
                library.HorizontalFlip(p=0.5),
                library.Affine(rotate=(-self.degrees, self.degrees), scale=self.scale, p=1.0),
                library.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter, hue=(0.0, 0.0), p=1.0),
                library.Normalize(MEAN, STD),
                to_tensor(),
            ],
            seed=7,
        )
        images = list(self.images.permute(0, 2, 3, 1).numpy())
        return Runner(
            lambda: torch.stack([pipeline(image=image)["image"] for image in images]),
            self.agreement,
            moments,
            self.goals["albumentations"],
        )

    def with_kornia(self) -> Runner:
        library = import_module("kornia.augmentation")
        pipeline = library.AugmentationSequential(
            library.RandomHorizontalFlip(p=0.5),
            library.RandomAffine(self.degrees, scale=self.scale, p=1.0),
            library.ColorJitter(self.jitter, self.jitter, self.jitter, 0.0, p=1.0),
            library.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
            data_keys=["input"],
        )
        images = self.images
        return Runner(
            lambda: pipeline(images.contiguous().float().div_(255)), self.agreement, moments, self.goals["kornia"]
        )


def moments(images: torch.Tensor) -> torch.Tensor:
    """Mean and deviation of each channel over a batch."""
    return torch.cat([images.mean((0, 2, 3)), images.std((0, 2, 3))])
