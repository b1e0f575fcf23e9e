"""The loop itself: one stage of epochs over batches that stay in memory, augmented in one call each.

The order of the images and every random draw are functions of (seed, epoch, image), and the checkpoint holds
everything else, so a training that was stopped and resumed ends with the same bits as one that never was.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from imgopt_fast.augment import Compose
from imgopt_fast.compress import Pruner, distillation_loss
from imgopt_fast.data import Dataset, batches_per_epoch
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.checkpoint import FILE, SECONDS, Position, interruptible, restore, save_checkpoint
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.evaluate import accuracy, density
from imgopt_fast.training.progress import Progress
from imgopt_fast.training.report import EpochRow, write_summary
from imgopt_fast.training.run_folder import RunFolder


class DivergedError(RuntimeError):
    """The loss is not finite any more."""


class InterruptedTrainingError(Exception):
    """Ctrl-C was pressed. The argument is the run folder, which holds a checkpoint to resume from."""


@dataclass(frozen=True)
class Stage:
    """Epochs under one optimizer and one rise and fall of the learning rate."""

    name: str
    first_epoch: int
    epochs: int
    lr: float
    warmup_epochs: float

    @property
    def end(self) -> int:
        return self.first_epoch + self.epochs


@dataclass(frozen=True)
class Fitting:
    """What every stage works with: `augment` for training images, `prepare` for the others."""

    config: TrainConfig
    dataset: Dataset
    augment: Augmentation
    prepare: Compose
    run: RunFolder


def fit(
    stage: Stage,
    model: nn.Module,
    fitting: Fitting,
    epochs: list[EpochRow],
    pruner: Pruner | None = None,
    teacher: nn.Module | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> list[EpochRow]:
    """Train `model` in place through the epochs of `stage`, from `checkpoint` on where there is one.

    With a `teacher`, a network in evaluation mode, the labels are only a part of the loss.

    Returns `epochs`, those of the stages before, with the new ones. Raises DivergedError or InterruptedTrainingError.
    """
    config, images = fitting.config, fitting.dataset.train
    steps = batches_per_epoch(len(images), config.batch_size)
    optimizer = _optimizer(model, config, stage.lr)
    schedule = LambdaLR(optimizer, lambda step: learning_rate(step, stage, steps, config.sched))
    if pruner is not None:
        pruner.optimizer = optimizer  # whose momentum must forget the pruned weights
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"pruner": pruner} if pruner else {})
    at = restore(checkpoint, parts) if checkpoint else Position(stage.name, stage.first_epoch, epochs=epochs)
    device, autocast, precision = images.labels.device, config.uses_amp(), torch.bfloat16

    saved = time.perf_counter()

    def save() -> None:
        nonlocal saved
        if not loss_sum.isfinite():  # nothing to resume from: the checkpoint before is
            raise DivergedError(f"the loss is {loss_sum.item()} in epoch {at.epoch + 1}; try a lower --lr")
        at.loss_sum = loss_sum.item()
        fitting.run.write(FILE, lambda path: save_checkpoint(path, at, parts))
        fitting.run.keep = True
        saved = time.perf_counter()

    done, total = (at.epoch - stage.first_epoch) * steps + at.batch, stage.epochs * steps
    bar = Progress(stage.name, total * config.batch_size, done=done * config.batch_size)
    with bar as progress, interruptible() as interrupted:
        while at.epoch < stage.end:
            model.train()
            began, count = time.perf_counter(), 0
            loss_sum = torch.tensor(at.loss_sum, dtype=torch.float64, device=device)
            for index, batch in images.shuffled(config.batch_size, seed=config.seed, epoch=at.epoch, first=at.batch):
                views, targets = fitting.augment(batch.images, batch.labels, (config.seed, at.epoch, index))
                with torch.autocast(device.type, precision, enabled=autocast):
                    loss = _loss(model(views), targets, views, teacher, config)
                optimizer.zero_grad()
                loss.backward()
                if config.clip_grad is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                schedule.step()
                if pruner is not None:
                    pruner.step()
                loss_sum += loss.detach()
                at.batch += 1
                count += len(index)
                progress.advance(len(index))
                if interrupted() or time.perf_counter() - saved > SECONDS:
                    save()
                if interrupted():
                    raise InterruptedTrainingError(fitting.run.path)
            mean_loss = loss_sum.item() / steps  # waits for a GPU: the seconds are those of the work
            seconds = time.perf_counter() - began
            if not math.isfinite(mean_loss):
                raise DivergedError(f"the loss is {mean_loss} in epoch {at.epoch + 1}; try a lower --lr")
            row = EpochRow(
                epoch=at.epoch + 1,
                stage=stage.name,
                train_loss=mean_loss,
                eval_top1=accuracy(model, fitting.dataset.validation, fitting.prepare),
                lr=optimizer.param_groups[0]["lr"],
                density=density(model),
                seconds=seconds,
                images_per_second=count / seconds,
            )
            at = Position(stage.name, at.epoch + 1, epochs=[*at.epochs, row])
            loss_sum.zero_()
            fitting.run.write("summary.csv", partial(write_summary, epochs=at.epochs))
            save()
            if interrupted():
                raise InterruptedTrainingError(fitting.run.path)
            progress.note(loss=f"{row.train_loss:.3f}", validation=f"{row.eval_top1:.1%}")
    return at.epochs


def _loss(logits: Tensor, labels: Tensor, images: Tensor, teacher: nn.Module | None, config: TrainConfig) -> Tensor:
    """Cross entropy, and beside it the distance to what `teacher` says about exactly these images."""
    if teacher is None or config.distill_loss_weight == 0:
        return F.cross_entropy(logits, labels, label_smoothing=config.smoothing)
    with torch.no_grad():
        taught = teacher(images)
    return distillation_loss(
        logits,
        taught,
        labels,
        temperature=config.kd_temperature,
        alpha=config.distill_loss_weight,
        label_smoothing=config.smoothing,
    )


def learning_rate(step: int, stage: Stage, steps_per_epoch: int, sched: str) -> float:
    """Share of the stage's highest rate at `step`: a linear rise, then half a cosine, or a line, down to zero."""
    warmup, total = stage.warmup_epochs * steps_per_epoch, stage.epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, total - warmup)
    return 1 - progress if sched == "linear" else (1 + math.cos(math.pi * progress)) / 2


def _optimizer(model: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """SGD or AdamW; biases and batch norm's parameters do not decay."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr)
    return torch.optim.SGD(groups, lr, config.momentum, nesterov=config.momentum > 0)
