"""The plain PyTorch loop that bench_train.py compares with: what a careful user writes.

A DataLoader over decoded images in memory with as many workers as threads, the same augmentation per sample in
albumentations (by Pillow where that is missing), float32, NCHW, SGD with the same settings and the same schedule. The
distributions of both augmentations are equal: over 12,000 views of one image, the means, deviations and neighbours'
products of all pixels differ by what 12,000 samples explain.
"""

import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from imgopt_fast.data import Dataset, load_dataset
from imgopt_fast.models import create_model
from imgopt_fast.training import TrainConfig

SHIFT = 3  # whole pixels either way, each as likely: half a pixel more than that, rounded
RECIPE = TrainConfig(
    model="resnet20", epochs=30, batch_size=128, lr=0.2, translate=(SHIFT + 0.5) / 32, quantize="none", prune_epochs=0,
    reference_epoch=False,
)  # fmt: skip


class PlainImages(TorchDataset[tuple[Tensor, int]]):
    """Decoded images in memory; each is augmented when a worker asks for it."""

    def __init__(self, config: TrainConfig, images: Tensor, labels: Tensor, mean: Any, std: Any) -> None:
        self.images, self.labels = images.permute(0, 2, 3, 1).contiguous().numpy(), labels.tolist()
        installed = find_spec("albumentations") is not None
        self.transform = (albumentations_views if installed else PillowViews)(config, mean, std)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self.transform(image=self.images[i])["image"]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), self.labels[i]


def albumentations_views(config: TrainConfig, mean: Any, std: Any) -> Any:
    import albumentations as A
    import cv2

    cv2.setNumThreads(0)
    turn = (-config.degrees, config.degrees)
    # In pixels: a share of the width would be cut to whole pixels towards zero, to smaller shifts than ours.
    return A.Compose([
        A.HorizontalFlip(p=config.hflip),
        A.Affine(config.scale, translate_px=(-SHIFT, SHIFT), rotate=turn, keep_ratio=True, p=1.0),
        A.Normalize(mean, std, max_pixel_value=255.0),
    ], seed=config.seed)  # fmt: skip


class PillowViews:
    """The same by Pillow, as torchvision does it: for machines without albumentations."""

    def __init__(self, config: TrainConfig, mean: Any, std: Any) -> None:
        self.config, self.mean, self.std = config, np.float32(mean), np.float32(std)
        self.set_random_seed(config.seed)

    def set_random_seed(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, image: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        picture, config = Image.fromarray(image), self.config
        if self.rng.random() < config.hflip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        angle, zoom = math.radians(self.rng.uniform(-config.degrees, config.degrees)), self.rng.uniform(*config.scale)
        cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
        centre_x, centre_y = picture.width / 2, picture.height / 2
        right, down = self.rng.integers(-SHIFT, SHIFT + 1, 2).tolist()
        x, y = centre_x + right, centre_y + down
        inverse = (cos, sin, centre_x - cos * x - sin * y, -sin, cos, centre_y + sin * x - cos * y)
        moved = picture.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        return {"image": (np.asarray(moved, np.float32) / 255 - self.mean) / self.std}


def own_draws(worker: int) -> None:
    """Workers are copies of one process: without this they would draw the same numbers for different images."""
    info = get_worker_info()
    info.dataset.transform.set_random_seed(info.seed % 2**32)


def plain_steps(config: TrainConfig, data: Dataset, model: nn.Module, workers: int, steps: int) -> Iterator[int]:
    """Trains `model` for `steps` updates under the schedule of `config`; yields the images of each."""
    mean, std = data.statistics()
    images = PlainImages(config, data.train.first(len(data.train)).images, data.train.labels, mean, std)
    loader = DataLoader(
        images, config.batch_size, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=workers > 0,
        worker_init_fn=own_draws,
    )  # fmt: skip
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, config.lr, config.momentum, nesterov=True)
    warmup = config.warmup_epochs * len(loader)

    def rate(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else (
            1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
        ) / 2  # fmt: skip

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    done = 0
    while done < steps:
        model.train()
        for batch, labels in loader:
            given, wanted = batch.to(config.device), labels.to(config.device)
            loss = F.cross_entropy(model(given), wanted, label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            yield len(labels)
            if done == steps:
                return


def plain_training(path: str, config: TrainConfig, workers: int) -> Callable[[int], int]:
    """Trains for a number of steps."""
    torch.set_num_threads(workers)
    torch.manual_seed(0)
    data = load_dataset(path)
    model = create_model(config.model, num_classes=len(data.class_names), in_channels=data.channels)
    loop = plain_steps(config, data, model, workers, config.epochs * len(data.train) // config.batch_size)
    return lambda count: sum(next(loop) for _ in range(count))
