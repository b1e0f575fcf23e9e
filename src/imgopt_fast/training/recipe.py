"""The whole training, from images to a small int8 classifier: dense, then pruned, then quantized, then tested once.

The validation images serve every look along the way. The test images are touched at the end only, when nothing is
left to choose.
"""

import copy
import dataclasses
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress import Int8Config, PruneConfig, load_weights, prune, quantize, save_weights
from imgopt_fast.data import Dataset, batches_per_epoch, load_dataset
from imgopt_fast.models import create_model
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.checkpoint import FILE as CHECKPOINT
from imgopt_fast.training.checkpoint import load_checkpoint
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.evaluate import accuracy, density, measure_speed, predictions
from imgopt_fast.training.loop import Fitting, Stage, fit
from imgopt_fast.training.network import FILE as CARD
from imgopt_fast.training.network import WEIGHTS, Card, load_network
from imgopt_fast.training.reference_loop import reference_epoch
from imgopt_fast.training.report import Report, StageRow, write_report
from imgopt_fast.training.run_folder import RunFolder

PRUNE_RAMP = 0.5  # share of the pruning steps over which weights are removed; the rest recovers
PRUNE_UPDATES = 20  # mask updates on that way


def train(config: TrainConfig) -> Report:
    """Train, prune, quantize and test a classifier; write the run folder; return what it reports.

    Raises DataError when the data cannot be read, ValueError when the configuration cannot work, OSError when the run
    folder cannot be written, DivergedError when the loss stops being finite, InterruptedTrainingError after Ctrl-C.
    """
    with RunFolder.create(_run_path(config)) as run:
        run.write("config.yaml", config.save)
        return _train(config, run, None)


def resume(path: Path) -> Report:
    """Continue the training in the run folder `path` where its last checkpoint left it, as `train` would have.

    On a CPU with the same number of threads the result has the bits of a training that was never stopped.
    """
    config = TrainConfig.load(path / "config.yaml")
    return _train(config, RunFolder(path), load_checkpoint(path / CHECKPOINT))


def _train(config: TrainConfig, run: RunFolder, checkpoint: dict[str, Any] | None) -> Report:
    began = time.perf_counter()
    data = Path(config.data) if config.data is not None else None
    dataset = load_dataset(data, image_size=config.img_size, validation=config.validation)
    mean, std = dataset.statistics()
    prepare = Compose([Normalize(mean, std)])
    augment = Augmentation(config, Normalize(mean, std), len(dataset.class_names))
    dataset = dataset.to(_device(config))
    fitting = Fitting(config, dataset, augment, prepare, run)
    files = _weight_files(config)
    torch.manual_seed(config.seed)
    model = _create(config, dataset)
    teacher = None
    if config.distill is not None:
        teacher = load_network(Path(config.distill)).as_teacher(dataset, (mean, std)).to(_device(config))
    networks = {}

    dense = Stage("dense", 0, config.epochs, config.lr, config.warmup_epochs)
    if checkpoint is None or checkpoint["position"].stage == dense.name:
        epochs = fit(dense, model, fitting, [], teacher=teacher, checkpoint=checkpoint)
        run.write(files[dense.name], partial(save_weights, model.state_dict()))
        checkpoint = None
    else:
        epochs = []  # the checkpoint has them
        model.load_state_dict(load_weights(run.path / files[dense.name]))
    networks[dense.name] = copy.deepcopy(model).eval()

    if "pruned" in files:
        pruner = prune(model, _prune_config(config, dataset))
        pruned = Stage("pruned", dense.end, config.prune_epochs, config.prune_lr, config.prune_warmup_epochs)
        epochs = fit(pruned, model, fitting, epochs, pruner, teacher or networks[dense.name], checkpoint)
        run.write(files[pruned.name], partial(save_weights, model.state_dict()))
        networks[pruned.name] = model

    if "int8" in files:
        sample = dataset.train.take(torch.arange(min(config.calibration, len(dataset.train))))
        batches = [prepare(batch.images) for batch in sample.in_order(config.batch_size)]
        networks["int8"] = quantize(model.eval(), batches, Int8Config())
        run.write(files["int8"], partial(save_weights, networks["int8"].state_dict()))

    height, width = dataset.train.images.shape[2:]
    card = Card(config.model, list(files)[-1], dataset.class_names, dataset.channels, height, width, mean, std)
    run.write(CARD, card.save)

    # The choices are made. Now, and only now, the test images.
    images = prepare(dataset.test.take(torch.arange(min(config.batch_size, len(dataset.test)))).images)
    stages = [
        StageRow(
            stage=name,
            test_top1=accuracy(network, dataset.test, prepare),
            density=density(network),
            file_bytes=(run.path / files[name]).stat().st_size,
            speed=measure_speed(network, images),
        )
        for name, network in networks.items()
    ]
    reference = None
    if config.reference_epoch:
        plain = _create(dataclasses.replace(config, channels_last=False), dataset)
        reference = reference_epoch(config, plain, dataset.train, mean, std)
    found = predictions(networks[stages[-1].stage], dataset.test, prepare)
    seconds = time.perf_counter() - began
    report = Report(config, dataset.to(torch.device("cpu")), run.path, epochs, stages, found.cpu(), reference, seconds)
    write_report(run, report)
    return report


def _weight_files(config: TrainConfig) -> dict[str, str]:
    """Stages of the recipe and the files that keep their networks; the last one is the result."""
    stages = (
        ["dense"]
        + ["pruned"] * (config.prune_epochs > 0 and config.sparsity > 0)
        + ["int8"] * (config.quantize == "int8")
    )
    return {stage: WEIGHTS if stage == stages[-1] else f"{stage}.safetensors" for stage in stages}


def _device(config: TrainConfig) -> torch.device:
    try:
        return torch.empty(0, device=config.device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {config.device!r}: {str(error).splitlines()[0]}") from error


def _create(config: TrainConfig, dataset: Dataset) -> nn.Module:
    model = create_model(config.model, num_classes=len(dataset.class_names), in_channels=dataset.channels)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    # torch's annotations do not know the argument.
    created: nn.Module = model.to(_device(config), memory_format=memory_format)  # type: ignore[call-overload]
    return created


def _run_path(config: TrainConfig) -> Path:
    data = "fashion-mnist" if config.data is None else Path(config.data).resolve().name
    name = f"{data}-{config.model.replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.output) / (config.experiment or name)


def _prune_config(config: TrainConfig, dataset: Dataset) -> PruneConfig:
    steps = batches_per_epoch(len(dataset.train), config.batch_size) * config.prune_epochs
    ramp = max(1, round(steps * PRUNE_RAMP))
    return PruneConfig(
        sparsity=config.sparsity, start_step=0, end_step=ramp, update_every=max(1, ramp // PRUNE_UPDATES)
    )
