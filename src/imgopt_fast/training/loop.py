"""The loop itself: one stage of epochs over batches that stay in memory, augmented in one call each.

The order of the images and every random draw are functions of (seed, epoch, image), and the checkpoint holds
everything else, so a training that was stopped and resumed ends with the same bits as one that never was.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imgopt_fast.augment import Compose
from imgopt_fast.compress import Pruner
from imgopt_fast.data import Dataset, batches_per_epoch
from imgopt_fast.training.allocator import freed_memory_kept
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.checkpoint import (
    FILE,
    GPU_SECONDS,
    SECONDS,
    Position,
    interruptible,
    restore,
    save_checkpoint,
)
from imgopt_fast.training.clock import Clock
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.evaluate import accuracy, density
from imgopt_fast.training.events import Events
from imgopt_fast.training.optimizers import Updates
from imgopt_fast.training.progress import Progress
from imgopt_fast.training.report import EpochRow, write_summary
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import Stage
from imgopt_fast.training.step import EagerStep, Learner, RecordedStep, own_stream, recordable
from imgopt_fast.training.teachers import Objective, Teacher
from imgopt_fast.training.transfer import training_mode

STOP, SAVE = 0, 1  # what a process tells the others with its gradients


class DivergedError(RuntimeError):
    """The loss is not finite any more."""


class InterruptedTrainingError(Exception):
    """Ctrl-C was pressed. The argument is the run folder, which holds a checkpoint to resume from."""


@dataclass(frozen=True)
class Fitting:
    """What every stage works with: `augment` for training images, `prepare` for the others.

    `times`: seconds per stage and phase.
    """

    config: TrainConfig
    dataset: Dataset
    augment: Augmentation
    prepare: Compose
    run: RunFolder
    process: Process
    events: Events
    times: dict[str, dict[str, float]] = field(default_factory=dict)


def fit(
    stage: Stage,
    model: nn.Module,
    fitting: Fitting,
    epochs: list[EpochRow],
    pruner: Pruner | None = None,
    teacher: Teacher | None = None,
    checkpoint: dict[str, Any] | None = None,
) -> list[EpochRow]:
    """Train `model` in place through the epochs of `stage`, from `checkpoint` on where there is one.

    Returns `epochs`, those of the stages before, with the new ones. Raises DivergedError or InterruptedTrainingError.
    """
    config, train, process = fitting.config, fitting.dataset.train, fitting.process
    whole_set = config.opt == "gd"
    steps = batches_per_epoch(len(train), config.batch_size, last=whole_set)
    per_update = steps if whole_set else min(config.grad_accum_steps, steps)
    objective = Objective(config, fitting.augment, fitting.dataset, model, teacher)
    updates = Updates(model, objective, config, stage, -(-steps // per_update), process, pruner)
    network = compiled(model, config.torchcompile, config.device) if config.torchcompile else model
    parts = {"model": model, "objective": objective} | updates.parts()
    at = restore(checkpoint, parts, process.rank) if checkpoint else Position(stage.name, stage.first_epoch)
    at.epochs = at.epochs or epochs

    device = train.labels.device
    loss_sum = torch.tensor(at.loss_sum / process.world, dtype=torch.float64, device=device)
    autocast = stage.amp and config.uses_amp()
    step = EagerStep(network, objective, updates, autocast, loss_sum)
    recorded = recordable(config, updates, process, per_update)
    learn: Learner = RecordedStep(step) if recorded else step
    halo = fitting.augment.halo if process.world > 1 else 0
    clock = Clock(device)
    # Alone, a process need not wait for its GPU to know what it said itself.
    flags = torch.zeros(2, device=device if process.world > 1 else "cpu")
    saved = time.perf_counter()

    def save() -> None:
        nonlocal saved
        total = loss_sum.clone()
        process.sum([total])
        if not total.isfinite():  # nothing to resume from: the checkpoint before is
            raise diverged(total.item(), at.epoch, fitting.run)
        at.loss_sum = total.item()
        states = process.gather(torch.get_rng_state())
        fitting.run.write(FILE, lambda path: save_checkpoint(path, at, parts, states))
        fitting.run.keep = True
        saved = time.perf_counter()

    done, total_steps = (at.epoch - stage.first_epoch) * steps + at.batch, stage.epochs * steps
    stream = own_stream(device) if recorded else nullcontext()
    bar = Progress(stage.name, total_steps * config.batch_size, done=done * config.batch_size, shown=process.main)
    with bar as progress, interruptible() as interrupted, freed_memory_kept(), stream:
        while at.epoch < stage.end:
            training_mode(model, keep_statistics=stage.keep_statistics)
            began, seen = time.perf_counter(), 0
            batches = train.shuffled(
                config.batch_size,
                seed=config.seed,
                epoch=at.epoch,
                first=at.batch,
                last=whole_set,
                share=process.share(halo),
            )
            clock.start()
            for index, batch in batches:
                clock.lap("wait")
                view = fitting.augment(batch.images, batch.labels, (config.seed, at.epoch, index), halo=halo)
                clock.lap("augment")
                with torch.autocast(device.type, config.amp_type(), enabled=autocast):
                    taught = objective.taught(view)
                first = at.batch // per_update * per_update  # of the batches of this update
                images = _images(len(train), config.batch_size, first, min(first + per_update, steps))
                updated = learn(
                    view.images,
                    view.targets,
                    taught,
                    share=len(view.index) / images,
                    of_epoch=len(view.index) / _images(len(train), config.batch_size, 0, steps),
                    lap=clock.lap,
                )
                at.batch += 1
                if at.batch % per_update == 0 or at.batch == steps:
                    flags[STOP], flags[SAVE] = interrupted(), process.main and time.perf_counter() - saved > SECONDS
                    updates.step(flags, applied=updated)
                clock.lap("step")
                seen += len(view.index)
                progress.advance(len(view.index) * process.world)
                if flags.any():
                    save()
                if flags[STOP]:
                    raise InterruptedTrainingError(fitting.run.path)
                clock.lap("step")
            process.sum([loss_sum])
            mean_loss = loss_sum.item()  # waits for a GPU: the seconds are those of the work
            seconds = time.perf_counter() - began
            if not math.isfinite(mean_loss):
                raise diverged(mean_loss, at.epoch, fitting.run)
            row = EpochRow(
                epoch=at.epoch + 1,
                stage=stage.name,
                train_loss=mean_loss,
                eval_top1=accuracy(updates.evaluated, fitting.dataset.validation, fitting.prepare, process=process),
                lr=updates.optimizer.param_groups[-1]["lr"],
                density=density(updates.evaluated),
                seconds=seconds,
                images_per_second=seen * process.world / seconds,
            )
            at = Position(stage.name, at.epoch + 1, epochs=[*at.epochs, row])
            loss_sum.zero_()
            fitting.times[stage.name] = clock.seconds()
            fitting.run.write("summary.csv", partial(write_summary, epochs=at.epochs))
            fitting.events.write(row, clock.seconds())
            progress.epoch(at.epoch - stage.first_epoch, stage.epochs, row, wait=clock.share("wait"))
            stopping = interrupted_anywhere(process, interrupted())
            fresh = fitting.run.keep and time.perf_counter() - saved < GPU_SECONDS
            if stopping or at.epoch == stage.end or not (recorded and fresh):
                save()
            if stopping:
                raise InterruptedTrainingError(fitting.run.path)
    updates.finish()
    objective.close()
    return at.epochs


def compiled(model: nn.Module, backend: str, device: str) -> Callable[[Tensor], Tensor]:
    """`model` through torch.compile; on a GPU as CUDA graphs, since small networks are bound by their launches."""
    graphs = backend == "inductor" and device.startswith("cuda")
    network: Callable[[Tensor], Tensor] = torch.compile(
        model, backend=backend, mode="reduce-overhead" if graphs else None
    )
    return network


def diverged(loss: float, epoch: int, run: RunFolder) -> DivergedError:
    before = f", from the weights before with --pretrained {run.path / FILE}" if run.keep else ""
    return DivergedError(f"the loss is {loss} in epoch {epoch + 1}; try a lower --lr{before}")


def interrupted_anywhere(process: Process, here: bool) -> bool:
    return any(process.gather(here))


def _images(count: int, batch_size: int, begin: int, end: int) -> int:
    """Images in the batches from `begin` to `end`."""
    return min(end * batch_size, count) - begin * batch_size
