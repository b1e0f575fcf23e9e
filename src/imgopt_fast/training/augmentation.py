"""The random views of the training images that a configuration asks for, in as few passes over memory as they allow."""

from torch import Tensor

from imgopt_fast.augment import (
    Compose,
    CutMix,
    MixUp,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
    Transform,
    TrivialAugmentWide,
)
from imgopt_fast.training.config import TrainConfig

POLICIES: dict[str, type[Transform]] = {"rand": RandAugment, "trivial": TrivialAugmentWide}


class Augmentation:
    """uint8 images and class indices in; normalized floats out, and targets that F.cross_entropy takes.

    Without a policy, erasing or mixing this is one call of affine_warp.
    """

    def __init__(self, config: TrainConfig, normalize: Normalize, classes: int) -> None:
        shift = (config.translate, config.translate)
        transforms: list[Transform] = [
            RandomHorizontalFlip(config.hflip),
            RandomAffine(config.degrees, translate=shift, scale=config.scale, interpolation="bilinear"),
        ]
        if config.aa != "none":
            transforms.append(POLICIES[config.aa]())
        transforms.append(normalize)
        if config.reprob > 0:
            transforms.append(RandomErasing(config.reprob, inplace=True))
        self.transform = Compose(transforms)
        self.mixing = [
            mix(alpha=alpha, num_classes=classes)
            for mix, alpha in ((MixUp, config.mixup), (CutMix, config.cutmix))
            if alpha > 0
        ]

    def __call__(self, images: Tensor, labels: Tensor, key: tuple[int, int, Tensor]) -> tuple[Tensor, Tensor]:
        views, targets = self.transform(images, key=key), labels
        for mix in self.mixing:
            views, targets = mix(views, targets, key=key)
        return views, targets
