"""The random views of the training images that a configuration asks for, in as few passes over memory as they allow.

A view keeps its draws: a teacher that wants another normalization or another size gets exactly the student's view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from imgopt_fast.augment import (
    Compose,
    CutMix,
    MixUp,
    Normalize,
    Params,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
    TrivialAugmentWide,
)
from imgopt_fast.training.config import TrainConfig

POLICIES: dict[str, type[Transform]] = {"rand": RandAugment, "trivial": TrivialAugmentWide}


@dataclass(frozen=True)
class View:
    """A batch as the student sees it: normalized floats, and targets that F.cross_entropy takes.

    `index` are the positions of its images in the training set, `source` the uint8 images with those of the halo, whose
    number is `halo`, in front (see distributed.Process.share); `draws` and `mixed` replay the view.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    source: Tensor
    halo: int
    draws: Params
    mixed: tuple[Params, ...]


class Augmentation:
    """uint8 images and class indices in, a View out.

    Without a policy, erasing or mixing this is one call of affine_warp.
    """

    def __init__(self, config: TrainConfig, normalize: Normalize, classes: int, size: Sequence[int] = ()) -> None:
        """`size`: (H, W) of the views, for crops."""
        self.config, self.normalize, self.size = config, normalize, tuple(size)
        self.transform = self._pipeline(normalize)
        self.mixing = [
            mix(alpha=alpha, num_classes=classes)
            for mix, alpha in ((MixUp, config.mixup), (CutMix, config.cutmix))
            if alpha > 0
        ]

    @property
    def halo(self) -> int:
        """Images before the first of a part of a batch that it depends on."""
        return len(self.mixing)

    def __call__(self, images: Tensor, labels: Tensor, key: tuple[int, int, Tensor], *, halo: int = 0) -> View:
        """The view of `images`; the first `halo` of them only mix into the others."""
        draws = self.transform.make_params(images, key=key)
        views, targets, mixed = self.transform.transform(images, draws), labels, []
        for mix in self.mixing:
            mixed.append(mix.make_params(views, key=key))
            views, targets = mix.transform(views, targets, mixed[-1])
        return View(views[halo:], targets[halo:], key[2][halo:], images, halo, draws, tuple(mixed))

    def replay(self, view: View, normalize: Normalize, size: Sequence[int]) -> Tensor:
        """The images of `view` with another normalization, then scaled to `size` (H, W)."""
        images = view.images
        if (normalize.mean, normalize.std) != (self.normalize.mean, self.normalize.std):
            images = self._pipeline(normalize).transform(view.source, view.draws)
            labels = view.index.new_zeros(len(images))
            for mix, draws in zip(self.mixing, view.mixed, strict=True):
                images, _ = mix.transform(images, labels, draws)
            images = images[view.halo :]
        if tuple(images.shape[2:]) != tuple(size):
            images = F.interpolate(images, tuple(size), mode="bilinear", antialias=True)
        return images

    def sources(self, images: Tensor, draws: Params) -> Tensor:
        """uint8 images as the draws move and colour them, before normalization: to be looked at."""
        plain = self._pipeline(Normalize([0.0] * images.shape[1], [1.0] * images.shape[1]))
        return plain.transform(images, draws)

    def _pipeline(self, normalize: Normalize) -> Compose:
        config = self.config
        shift = (config.translate, config.translate)
        transforms: list[Transform] = []
        if config.crop_scale is not None:
            transforms.append(RandomResizedCrop(self.size, config.crop_scale, config.crop_ratio))
        transforms += [
            RandomHorizontalFlip(config.hflip),
            RandomAffine(config.degrees, translate=shift, scale=config.scale, interpolation="bilinear"),
        ]
        if config.aa != "none":
            transforms.append(POLICIES[config.aa]())
        transforms.append(normalize)
        if config.reprob > 0:
            transforms.append(RandomErasing(config.reprob, inplace=True))
        return Compose(transforms)
