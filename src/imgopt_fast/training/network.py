"""A trained network on disk and back: its weights, and `network.yaml`, which says how to build it and feed it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress import Int8Config, PruneConfig, load_weights, prune, quantize
from imgopt_fast.compress.quantize import Int8Model
from imgopt_fast.compress.quantize.names import key
from imgopt_fast.data import Dataset, Split
from imgopt_fast.models import create_model
from imgopt_fast.nn import Int8Segment
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.images import load_images, preparation
from imgopt_fast.training.teachers import Teacher

FILE, WEIGHTS = "network.yaml", "model.safetensors"
FLOAT_STAGES = ("distilled", "pruned", "dense")  # the last one first
# An int8 network is built by quantizing an untrained one, for its structure: every scale and weight is in the file, so
# that the numbers may come from the cheapest way of choosing them.
SKELETON = Int8Config(calibration="minmax", equalize=False, bias_correction=False, rounding="nearest")


@dataclass(frozen=True)
class Card:
    """How to build the network of model.safetensors, and what images it was trained on."""

    model: str
    stage: str  # the stage that it comes from: "int8" for an int8 network
    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    power_of_two: bool = False  # of an int8 network: whether it computes in shifts

    def save(self, path: Path) -> None:
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> "Card":
        """The card in the file `path`; ValueError when it is none."""
        try:
            stored = yaml.safe_load(path.read_text())
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
            return cls(**values)
        except FileNotFoundError as error:
            raise ValueError(f"{path.parent}: not the folder of a finished run, it has no {path.name}") from error
        except (yaml.YAMLError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the description of a network") from error

    def prepare(self) -> Compose:
        """uint8 images to what the network takes."""
        return Compose([Normalize(self.mean, self.std)])


@dataclass(frozen=True)
class Network:
    """A trained network in evaluation mode, with its card."""

    card: Card
    module: nn.Module

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(N, classes) of uint8 `images` (N, C, H, W)."""
        return torch.softmax(self.module(self.card.prepare()(images)).float(), dim=1)

    def as_teacher(self, dataset: Dataset) -> Teacher:
        """The network as a teacher of the images of `dataset`.

        Raises ValueError when it knows other classes or another number of channels.
        """
        if self.card.class_names != dataset.class_names or self.card.channels != dataset.channels:
            raise ValueError(
                f"distill: expected a teacher of the {len(dataset.class_names)} classes and {dataset.channels} "
                f"channels of {dataset.name}, got one of {len(self.card.class_names)} and {self.card.channels}"
            )
        device = dataset.validation.labels.device
        normalize = Normalize(self.card.mean, self.card.std)
        return Teacher(self.module.to(device), normalize, (self.card.height, self.card.width))


def load_network(run: Path, stage: str | None = None) -> Network:
    """The network of the run folder `run` as it was after `stage`, by default the final one.

    Raises ValueError when there is none or its files do not fit together.
    """
    card, weights = Card.load(run / FILE), WEIGHTS
    if stage is not None and stage != card.stage:
        card, weights = dataclasses.replace(card, stage=stage), f"{stage}.safetensors"
    module: nn.Module = create_model(card.model, num_classes=len(card.class_names), in_channels=card.channels)
    module = _to_channels_last(module).eval()
    stored = load_weights(run / weights)
    if any(name.endswith("weight_mask") for name in stored):
        prune(module, PruneConfig(sparsity=0))  # the layers; the masks are among the weights
    elif card.stage == "int8":
        skeleton = dataclasses.replace(SKELETON, power_of_two=card.power_of_two)
        module = quantize(module, [torch.rand(2, card.channels, card.height, card.width)], skeleton)
    try:
        module.load_state_dict(stored)
    except RuntimeError as error:
        raise ValueError(f"{run / weights}: not the weights of {card.model} that {FILE} describes") from error
    if isinstance(module, Int8Model):
        _report_zeros(module)
    return Network(card, module.eval())


def _report_zeros(module: Int8Model) -> None:
    """The report speaks of the untrained network's zeros; now of those that were loaded."""
    segments = [part for part in module.modules() if isinstance(part, Int8Segment)]
    zeros = {name: text for segment in segments for name, text in segment.zeros().items()}
    layers = [dataclasses.replace(layer, zeros=zeros.get(key(layer.name), "")) for layer in module.report.layers]
    module.report = dataclasses.replace(module.report, layers=layers)


def last_float(run: Path) -> Network | None:
    """The network of the last stage of the run folder before int8; None where its weights are not there."""
    card = Card.load(run / FILE)
    kept = [stage for stage in FLOAT_STAGES if stage == card.stage or (run / f"{stage}.safetensors").exists()]
    return load_network(run, kept[0]) if kept else None


def test_images(run: Path) -> Split:
    """The test images of the data that the run was trained on; DataError when it cannot be read."""
    return load_images(TrainConfig.load(run / "config.yaml")).test


def requantize(run: Path, config: Int8Config) -> Network:
    """The last float network of the run folder `run`, quantized anew with the run's calibration images.

    Raises ValueError when the folder has no float network, DataError when its training images cannot be read.
    """
    card, floating = Card.load(run / FILE), last_float(run)
    if floating is None:
        raise ValueError(f"{run}: has no float network to quantize again")
    settings = TrainConfig.load(run / "config.yaml")
    sample = load_images(settings).train.sample(settings.calibration)
    prepare = preparation(settings, card.mean, card.std)
    batches = [prepare(batch.images) for batch in sample.in_order(settings.batch_size)]
    card = dataclasses.replace(card, stage="int8", power_of_two=config.power_of_two)
    return Network(card, quantize(floating.module, batches, config))


def _to_channels_last(module: Any) -> nn.Module:
    moved: nn.Module = module.to(memory_format=torch.channels_last)
    return moved
