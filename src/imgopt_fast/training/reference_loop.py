"""One epoch of the same training as a careful PyTorch user writes it, to compare the time with.

The same network, images, batch size, ranges of the augmentation, loss and optimizer; images already decoded in
memory, no worker processes to feed, each image its own affine map through `affine_grid` and `grid_sample`, float32,
PyTorch's default memory layout. Everything that could be taken out of the loop has been.
"""

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgopt_fast.data import Split, batches_per_epoch
from imgopt_fast.training.config import TrainConfig


def reference_epoch(
    config: TrainConfig, model: nn.Module, train: Split, mean: Sequence[float], std: Sequence[float]
) -> float:
    """Seconds for one epoch that trains `model`; `mean` and `std` are per channel, in [0, 1] units."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr / 10,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    images, device = train.images.contiguous(), train.images.device
    shift = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    steps = batches_per_epoch(len(train), config.batch_size)
    begin = time.perf_counter()
    order = torch.randperm(len(train), device=device)
    for step in range(steps):
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        batch = (_random_affine(config, images[index].float() / 255) - shift) / scale
        loss = F.cross_entropy(model(batch), train.labels[index], label_smoothing=config.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for a GPU
    return time.perf_counter() - begin


def _random_affine(config: TrainConfig, images: Tensor) -> Tensor:
    n, _, height, width = images.shape
    radians = math.radians(config.degrees)
    angle = torch.empty(n).uniform_(-radians, radians)
    zoom = torch.empty(n).uniform_(*config.scale)
    flip = 1 - 2 * (torch.rand(n) < config.hflip).float()
    shift = torch.empty(n, 2).uniform_(-2 * config.translate, 2 * config.translate)  # the grid's units: 2 is the width
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [flip * cos, -sin * height / width, shift[:, 0], flip * sin * width / height, cos, shift[:, 1]], dim=1
    ).view(n, 2, 3)
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
