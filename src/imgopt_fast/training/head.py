"""A last layer trained on features that were computed once: transfer in seconds.

The frozen network looks at every image a single time, without augmentation; what its last layer is given is kept, and
the layer alone learns from that. Features are standardized for the training, and the layer's weights take it over.
"""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgopt_fast.augment import Compose
from imgopt_fast.data import TrainingSplit
from imgopt_fast.training.evaluate import density
from imgopt_fast.training.loop import Fitting
from imgopt_fast.training.report import EpochRow
from imgopt_fast.training.stages import Stage
from imgopt_fast.training.teachers import Features
from imgopt_fast.training.transfer import head_name

BATCH = 256
RATE, DECAY = 0.01, 1e-4  # of AdamW on standardized features


@torch.no_grad()
def features_of(
    model: nn.Module, split: TrainingSplit, prepare: Compose, precision: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(N, D) what the last linear layer is given for each image, and (N,) the labels.

    `precision`: of autocast, None for none.
    """
    model.eval()
    hook, features, labels = Features(model), [], []
    for batch in split.in_order(BATCH):
        with torch.autocast(batch.labels.device.type, precision, enabled=precision is not None):
            model(prepare(batch.images))
        features.append(hook.taken().float())
        labels.append(batch.labels)
    hook.remove()
    return torch.cat(features), torch.cat(labels)


def fit_head(stage: Stage, model: nn.Module, fitting: Fitting) -> list[EpochRow]:
    """Train the last linear layer of `model` in place through the epochs of `stage`; a row for each.

    Raises ValueError where the network does not end in a linear layer.
    """
    config, began = fitting.config, time.perf_counter()
    precision = config.amp_type() if config.uses_amp() else None
    train, labels = features_of(model, fitting.dataset.train, fitting.prepare, precision)
    held_out, truth = features_of(model, fitting.dataset.validation, fitting.prepare, precision)
    fitting.times[stage.name] = {"features": time.perf_counter() - began}
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, held_out = (train - mean) / std, (held_out - mean) / std

    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)
    learner = nn.Linear(head.in_features, head.out_features).to(train.device)
    with torch.no_grad():  # what was transferred, seen through the standardization
        learner.weight.copy_(head.weight * std)
        learner.bias.copy_(head.weight @ mean + (0 if head.bias is None else head.bias))
    optimizer = torch.optim.AdamW(learner.parameters(), RATE, weight_decay=DECAY)
    steps = max(1, len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / (steps * stage.epochs))) / 2
    )
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[EpochRow] = []
    for epoch in range(stage.epochs):
        began, total = time.perf_counter(), 0.0
        order = torch.randperm(len(train), generator=generator).to(train.device)
        for index in order.tensor_split(steps):
            loss = F.cross_entropy(learner(train[index]), labels[index], label_smoothing=config.smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index) / len(train)
        seconds = time.perf_counter() - began
        found = learner(held_out).argmax(1)
        rows.append(
            EpochRow(
                epoch=stage.first_epoch + epoch + 1,
                stage=stage.name,
                train_loss=total,
                eval_top1=int((found == truth).sum()) / len(truth),
                lr=optimizer.param_groups[0]["lr"],
                density=density(model),
                seconds=seconds,
                images_per_second=len(train) / seconds,
            )
        )
    with torch.no_grad():
        head.weight.copy_(learner.weight / std)
        if head.bias is not None:
            head.bias.copy_(learner.bias - head.weight @ mean)
    fitting.times[stage.name]["head"] = sum(row.seconds for row in rows)
    return rows
