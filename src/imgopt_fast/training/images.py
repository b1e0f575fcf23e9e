"""The images of a training at the sizes that it wants, and what makes network inputs of them.

With crops (`--crop-scale`), training images may be kept larger than the network takes them (`--source-size`), so that
each epoch's crop still has the photo's own pixels; held-out images are brought to the network's size once.
"""

import dataclasses
from collections.abc import Sequence

import torch

from imgopt_fast.augment import Compose, Normalize, Resize
from imgopt_fast.data import Dataset, Split, load_dataset
from imgopt_fast.training.config import TrainConfig

BATCH = 256  # images per call


def load_images(config: TrainConfig) -> Dataset:
    """The data set of `config`. Raises DataError."""
    dataset = load_dataset(config.data, image_size=config.source_size or config.img_size, validation=config.validation)
    if config.source_size is None:
        return dataset
    validation, test = (_resized(split, config) for split in (dataset.validation, dataset.test))
    return dataclasses.replace(dataset, validation=validation, test=test)


def preparation(config: TrainConfig, mean: Sequence[float], std: Sequence[float]) -> Compose:
    """uint8 images to what the network takes, without augmentation."""
    normalize = Normalize(mean, std)
    return Compose([normalize] if config.source_size is None else [Resize(_side(config)), normalize])


def _resized(split: Split, config: TrainConfig) -> Split:
    resize = Resize(_side(config))
    images = torch.cat([resize(batch.images) for batch in split.in_order(BATCH)])
    return Split(images.contiguous(memory_format=torch.channels_last), split.labels)


def _side(config: TrainConfig) -> tuple[int, int]:
    assert config.img_size is not None  # TrainConfig sees to it
    return config.img_size, config.img_size
