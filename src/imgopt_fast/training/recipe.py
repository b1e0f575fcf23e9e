"""The whole training, from images to a small int8 classifier: dense, pruned, distilled, int8-aware, int8, tested once.

The validation images serve every look along the way. The test images are touched at the end only, when nothing is
left to choose.
"""

import copy
import dataclasses
import logging
import os
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress import Int8Config, PruneConfig, load_weights, prune, qat, quantize, save_weights
from imgopt_fast.compress.quantize import Int8Model
from imgopt_fast.data import Dataset, Split, batches_per_epoch
from imgopt_fast.models import absolute_file, create_model
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.batch_size import with_batch_size
from imgopt_fast.training.checkpoint import FILE as CHECKPOINT
from imgopt_fast.training.checkpoint import load_checkpoint
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.distributed import Process, joined, local_device
from imgopt_fast.training.evaluate import accuracy, density, measure_speed, predictions
from imgopt_fast.training.events import Events
from imgopt_fast.training.head import fit_head
from imgopt_fast.training.images import load_images, preparation
from imgopt_fast.training.layers import int8_layers
from imgopt_fast.training.loop import Fitting, fit
from imgopt_fast.training.memory import peak_memory
from imgopt_fast.training.network import FILE as CARD
from imgopt_fast.training.network import WEIGHTS, Card, last_float, load_network
from imgopt_fast.training.reference_loop import reference_epoch
from imgopt_fast.training.report import EpochRow, Report, StageRow, write_report, write_summary
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import planned
from imgopt_fast.training.teachers import Teacher
from imgopt_fast.training.transfer import freeze_body, read_checkpoint, thaw, transfer_weights

DEFAULT_MODEL = "resnet8"
PRUNE_RAMP = 0.5  # share of the pruning steps over which weights are removed; the rest recovers
PRUNE_UPDATES = 20  # mask updates on that way
LAYER_IMAGES = 32  # that the layers of the int8 network are measured on

logger = logging.getLogger("imgopt_fast")


def train(config: TrainConfig) -> Report:
    """Train, prune, quantize and test a classifier; write the run folder; return what it reports.

    Raises DataError when the data cannot be read, ValueError when the configuration cannot work, OSError when the run
    folder cannot be written, DivergedError when the loss stops being finite, InterruptedTrainingError after Ctrl-C.
    Under torchrun each process calls it; the report of the first one has the final tests.
    """
    config = _settled(config)
    with joined(config.device) as process:
        path = Path(process.gather(str(_run_path(config)))[0])  # the name has a time in it
        with RunFolder.create(path, writes=process.main) as run:
            run.write("config.yaml", config.save)  # with it a run that is killed before its first checkpoint resumes
            return _train(config, run, process, None)


def resume(path: Path) -> Report:
    """Continue the training in the run folder `path` where its last checkpoint left it, as `train` would have.

    Without a checkpoint it begins again, in the same folder.
    On a CPU with the same number of threads and processes the result has the bits of a training that was never
    stopped; with another number of processes it goes on from the same weights, images and draws.
    """
    config = TrainConfig.load(path / "config.yaml")
    with joined(config.device) as process:
        found = process.gather((path / CHECKPOINT).exists())[0]  # of one process, which will write another
        if not found and process.main:
            logger.info(f"{path}: stopped before its first checkpoint; begins again")
        run = RunFolder(path, writes=process.main, keep=found)
        return _train(config, run, process, load_checkpoint(path / CHECKPOINT) if found else None)


def _train(config: TrainConfig, run: RunFolder, process: Process, checkpoint: dict[str, Any] | None) -> Report:
    began, device = time.perf_counter(), _device(config)
    with process.main_first():
        dataset = load_images(config)
    source = _source(config)
    mean, std = dataset.statistics() if source is None else (source.mean, source.std)
    times = {"data": {"decode": time.perf_counter() - began}}
    dataset = dataset.to(device)
    if process.main and dataset.skipped:
        logger.warning(f"{dataset.name}: left out {len(dataset.skipped)} images that cannot be read; see report.md")
    prepare = preparation(config, mean, std)
    torch.manual_seed(config.seed)
    model, given = _start(config, dataset)
    _check_fit(config, dataset, model, prepare)
    config = with_batch_size(config, dataset, model, prepare, process)
    run.write("config.yaml", config.save)  # another machine would choose others
    _check_world(config, dataset, process)
    if process.main:
        logger.info(_about(dataset, config))
    shape = dataset.validation.shape  # of the network's input
    augment = Augmentation(config, Normalize(mean, std), len(dataset.class_names), shape[1:])
    events = Events(run.path if process.main else None)
    fitting = Fitting(config, dataset, augment, prepare, run, process, events, times)
    torch.manual_seed(config.seed + process.rank)  # dropout and sampled gradients differ between the processes
    teacher = load_network(Path(config.distill)).as_teacher(dataset) if config.distill is not None else None
    files = _weight_files(config, given)
    networks, epochs = _networks(model, given, files, fitting, teacher, checkpoint)
    card = Card(config.model, list(files)[-1], dataset.class_names, *shape, mean, std, config.quantize == "pow2")
    run.write(CARD, card.save)
    left_out = [skipped for part in process.gather(dataset.left_out()) for skipped in part]
    fitting = dataclasses.replace(fitting, dataset=dataclasses.replace(dataset, skipped=tuple(dict.fromkeys(left_out))))
    # The choices are made. Now, and only now, the test images; the first process measures, and alone.
    return _tested(networks, files, epochs, fitting, began) if process.main else _untested(epochs, fitting, began)


def _networks(
    model: nn.Module,
    given: str,
    files: dict[str, str],
    fitting: Fitting,
    teacher: Teacher | None,
    checkpoint: dict[str, Any] | None,
) -> tuple[dict[str, nn.Module], list[EpochRow]]:
    """What the stages make of `model`, by their names and each in its file, and the epochs that it took."""
    config, dataset, run, stages = fitting.config, fitting.dataset, fitting.run, planned(fitting.config)
    at = checkpoint["position"] if checkpoint is not None else None
    epochs = at.epochs if at is not None else []
    networks: dict[str, nn.Module] = {}
    if given:
        run.write(files[given], partial(save_weights, model.state_dict()))
        networks[given] = copy.deepcopy(model).eval()
    for stage in stages:
        pruner = None
        if config.transfer != "finetune" and not stage.frozen:
            thaw(model)
        if stage.name == "pruned":
            pruner = prune(model, _prune_config(config, dataset))
        elif stage.name == "qat":
            model = qat(model.eval(), _calibration(config, fitting), _int8_config(config))
        if at is not None and stage.end <= at.epoch and stage.name != at.stage:
            if stage.name in files:  # a later one has the weights of those without
                model.load_state_dict(load_weights(run.path / files[stage.name]))
        else:
            taught_by = teacher
            if teacher is None and networks:  # the first network is the largest
                largest = next(iter(networks.values()))
                taught_by = Teacher(largest, fitting.augment.normalize, dataset.validation.shape[1:])
            if stage.frozen and config.transfer == "features":
                epochs = fit_head(stage, model, fitting)
                run.write("summary.csv", partial(write_summary, epochs=epochs))
            else:
                epochs = fit(stage, model, fitting, epochs, pruner, taught_by, checkpoint)
            checkpoint = None
            if stage.name in files:
                run.write(files[stage.name], partial(save_weights, model.state_dict()))
        if stage.name in files:
            networks[stage.name] = copy.deepcopy(model).eval()
    fitting.events.close()
    if "int8" in files:
        float_model: Any = model.eval()
        aware = bool(stages) and stages[-1].name == "qat"
        int8 = float_model.convert() if aware else quantize(model, _calibration(config, fitting), _int8_config(config))
        networks["int8"] = int8
        run.write(files["int8"], partial(save_weights, int8.state_dict()))
    return networks, epochs


def _untested(epochs: list[EpochRow], fitting: Fitting, began: float) -> Report:
    found, seconds = torch.empty(0, dtype=torch.int64), time.perf_counter() - began
    return Report(
        fitting.config, fitting.dataset, fitting.run.path, epochs, [], found, None, seconds, fitting.times, None
    )


def _tested(
    networks: dict[str, nn.Module], files: dict[str, str], epochs: list[EpochRow], fitting: Fitting, began: float
) -> Report:
    """The report of all networks, written into the run folder."""
    config, dataset, run, prepare = fitting.config, fitting.dataset, fitting.run, fitting.prepare
    memory = peak_memory(run.path, list(files)) if config.memory else {}
    images = prepare(dataset.test.first(config.batch_size).images)
    rows = [
        StageRow(
            stage=name,
            test_top1=accuracy(network, dataset.test, prepare),
            density=density(network),
            file_bytes=(run.path / files[name]).stat().st_size,
            peak_bytes=memory.get(name),
            speed=measure_speed(network, images),
        )
        for name, network in networks.items()
    ]
    last, layers = networks[rows[-1].stage], None
    if isinstance(last, Int8Model):
        before, shift = networks[rows[-2].stage], config.quantize == "pow2"
        layers = int8_layers(last, images[:LAYER_IMAGES], before, power_of_two=shift)
    reference = None
    if config.reference_epoch and isinstance(dataset.train, Split) and config.crop_scale is None:
        plain, normalize = _create(dataclasses.replace(config, channels_last=False), dataset), fitting.augment.normalize
        reference = reference_epoch(config, plain, dataset.train, normalize.mean, normalize.std)
    found = predictions(last, dataset.test, prepare).cpu()
    seconds, shown = time.perf_counter() - began, dataset.to(torch.device("cpu"))
    report = Report(config, shown, run.path, epochs, rows, found, reference, seconds, fitting.times, layers)
    write_report(run, report, fitting.augment)
    return report


def _about(dataset: Dataset, config: TrainConfig) -> str:
    channels, height, width = dataset.train.shape
    kept = "streamed" if not isinstance(dataset.train, Split) else "in memory" if dataset.train.resident else "mapped"
    counts = ", ".join(
        f"{len(split):,} {name}"
        for name, split in (("training", dataset.train), ("validation", dataset.validation), ("test", dataset.test))
    )
    colours = "grey" if channels == 1 else "colour"
    return (
        f"{dataset.name}: {len(dataset.class_names)} classes; {counts} images"
        f"{f' ({dataset.splits})' if dataset.splits else ''}, {colours}, {width}x{height}, {kept}; "
        f"batches of {config.batch_size}"
    )


def _source(config: TrainConfig) -> Card | None:
    """What the run folder that the training begins with says about its network."""
    path = Path(config.pretrained) if config.pretrained is not None else None
    return Card.load(path / CARD) if path is not None and path.is_dir() else None


def _settled(config: TrainConfig) -> TrainConfig:
    """With the network named, which a run to begin with knows, and inputs that are found from any other folder."""
    source, model = _source(config), config.model
    if source is not None and (config.epochs == 0 or not model):
        model = source.model
    return dataclasses.replace(
        config,
        model=absolute_file(model or DEFAULT_MODEL),
        data=_absolute(config.data),
        pretrained=_absolute(config.pretrained),
        distill=_absolute(config.distill),
    )


def _absolute(place: str | None) -> str | None:
    """A path of files or a pattern of them; a URL or a command of the webdataset library stays as it is."""
    return place if place is None or ":" in place.split("/")[0] else os.path.abspath(place)


def _start(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, str]:
    """The network that the training begins with; beside it the name of its stage where it is a result already."""
    if config.pretrained is None:
        return _create(config, dataset), ""
    path, card = Path(config.pretrained), _source(config)
    if card is not None:
        source = last_float(path)
        if source is None:
            raise ValueError(f"{path}: has no float network")
        if card.channels != dataset.channels:
            raise ValueError(
                f"pretrained: {path} takes {card.channels} channels, {dataset.name} has {dataset.channels}"
            )
        if config.epochs == 0:
            if card.class_names != dataset.class_names:
                raise ValueError(f"pretrained: {path} knows other classes than {dataset.name}; expected --epochs")
            return _placed(config, source.module), source.card.stage
        weights, known = source.module.state_dict(), list(card.class_names)
    else:
        weights, known = read_checkpoint(path), None
    model = _create(config, dataset)
    what = f"{path}, a {card.model}," if card is not None else str(path)
    left = transfer_weights(model, weights, dataset.class_names, known, what=f"{what} and --model {config.model}")
    logger.info(f"{path}: " + (f"all but {_few(left)} is taken" if left else "every weight is taken"))
    if config.transfer != "finetune":
        freeze_body(model)
    return model, "" if config.epochs else "dense"


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _int8_config(config: TrainConfig) -> Int8Config:
    return Int8Config(power_of_two=config.quantize == "pow2")


def _calibration(config: TrainConfig, fitting: Fitting) -> list[torch.Tensor]:
    sample = fitting.dataset.train.sample(config.calibration)
    return [fitting.prepare(batch.images) for batch in sample.in_order(config.batch_size)]


def _weight_files(config: TrainConfig, given: str) -> dict[str, str]:
    """Stages of the recipe and the files that keep their networks; the last one is the result."""
    names = [given] if given else []
    names += [stage.name for stage in planned(config) if stage.name not in ("head", "qat")]
    names += ["int8"] * (config.quantize != "none")
    return {name: WEIGHTS if name == names[-1] else f"{name}.safetensors" for name in names}


def _check_world(config: TrainConfig, dataset: Dataset, process: Process) -> None:
    short = len(dataset.train) % config.batch_size if config.opt == "gd" else 0
    smallest = min([config.batch_size, len(dataset.train), *[short] * (short > 0)])
    if smallest < process.world:
        raise ValueError(f"batch_size: expected an image for each of {process.world} processes in every batch")


@torch.no_grad()
def _check_fit(config: TrainConfig, dataset: Dataset, model: nn.Module, prepare: Compose) -> None:
    """ValueError where the network does not take the images, or does not say one number per class of each."""
    images = prepare(dataset.validation.take(torch.zeros(2, dtype=torch.int64)).images)
    channels, height, width = images.shape[1:]
    what = f"model: {config.model} with images of {width}x{height} pixels and {channels} channels"
    try:
        logits = copy.deepcopy(model).eval()(images)
    except Exception as error:  # a network of the user's own may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {reason[0]}") from error
    expected = (2, len(dataset.class_names))
    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"{what}: expected logits of shape {expected} for two images, got {found}")


def _device(config: TrainConfig) -> torch.device:
    try:
        return torch.empty(0, device=local_device(config.device)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: cannot use {config.device!r}: {str(error).splitlines()[0]}") from error


def _create(config: TrainConfig, dataset: Dataset) -> nn.Module:
    return _placed(
        config, create_model(config.model, num_classes=len(dataset.class_names), in_channels=dataset.channels)
    )


def _placed(config: TrainConfig, model: nn.Module) -> nn.Module:
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    # torch's annotations do not know the argument.
    placed: nn.Module = model.to(_device(config), memory_format=memory_format)  # type: ignore[call-overload]
    return placed


def _run_path(config: TrainConfig) -> Path:
    data = "fashion-mnist" if config.data is None else Path(config.data).resolve().name
    name = f"{data}-{config.model_title().replace(':', '.')}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.output) / (config.experiment or name)


def _prune_config(config: TrainConfig, dataset: Dataset) -> PruneConfig:
    steps = batches_per_epoch(len(dataset.train), config.batch_size) * config.prune_epochs
    ramp = max(1, round(steps * PRUNE_RAMP))
    return PruneConfig(
        sparsity=config.sparsity, start_step=0, end_step=ramp, update_every=max(1, ramp // PRUNE_UPDATES)
    )
