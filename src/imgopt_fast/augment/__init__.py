"""Batched augmentation: torchvision's transforms with a draw per sample, folded into one pass over memory.

aug = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip(), Normalize(mean, std)])
batch = aug(images, key=(seed, epoch, index))       # uint8 in, normalised floats out, one call of affine_warp
"""

from imgopt_fast.augment import geometry, tables
from imgopt_fast.augment.color import (
    ColorJitter,
    Normalize,
    RandomGrayscale,
    hsv_to_rgb,
    rgb_to_hsv,
    scale_color,
)
from imgopt_fast.augment.crops import CenterCrop, RandomCrop, RandomResizedCrop, Resize
from imgopt_fast.augment.erasing import RandomErasing
from imgopt_fast.augment.mixing import CutMix, MixUp
from imgopt_fast.augment.policies import RandAugment, TrivialAugmentWide
from imgopt_fast.augment.transform import Compose, Params, Transform
from imgopt_fast.augment.warps import (
    RandomAffine,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomRotation,
    RandomVerticalFlip,
)
from imgopt_fast.ops.photometric import adjust_hue, adjust_sharpness

__all__ = [
    "CenterCrop",
    "ColorJitter",
    "Compose",
    "CutMix",
    "MixUp",
    "Normalize",
    "Params",
    "RandAugment",
    "RandomAffine",
    "RandomCrop",
    "RandomErasing",
    "RandomGrayscale",
    "RandomHorizontalFlip",
    "RandomPerspective",
    "RandomResizedCrop",
    "RandomRotation",
    "RandomVerticalFlip",
    "Resize",
    "Transform",
    "TrivialAugmentWide",
    "adjust_hue",
    "adjust_sharpness",
    "geometry",
    "hsv_to_rgb",
    "rgb_to_hsv",
    "scale_color",
    "tables",
]
