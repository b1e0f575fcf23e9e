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
from imgopt_fast.data import Dataset
from imgopt_fast.models import create_model

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel

FILE, WEIGHTS = "network.yaml", "model.safetensors"
# An int8 network is built by quantizing an untrained one, for its structure: every scale and weight is in the file, so
# that the numbers may come from the cheapest way of choosing them.
SKELETON = Int8Config(calibration="minmax", equalize=False, bias_correction=False)


@dataclass(frozen=True)
class Card:
    """How to build the network of model.safetensors, and what images it was trained on."""

    model: str
    stage: str  # "dense", "pruned" or "int8": what kind of layers it has
    class_names: tuple[str, ...]
    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

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

    def as_teacher(self, dataset: Dataset, statistics: Statistics) -> nn.Module:
        """The network for images of `dataset` that were normalized by its own `statistics` (mean, std).

        Raises ValueError when the network knows other classes or another number of channels.
        """
        if self.card.class_names != dataset.class_names or self.card.channels != dataset.channels:
            raise ValueError(
                f"distill: expected a teacher of the {len(dataset.class_names)} classes and {dataset.channels} "
                f"channels of {dataset.name}, got one of {len(self.card.class_names)} and {self.card.channels}"
            )
        return _Renormalized(self.module, statistics, (self.card.mean, self.card.std)).eval()


class _Renormalized(nn.Module):
    """`module` behind the change from one mean and standard deviation per channel to another."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, given: Statistics, wanted: Statistics) -> None:
        super().__init__()
        self.module = module
        (mean, std), (new_mean, new_std) = (torch.tensor(given)[..., None, None], torch.tensor(wanted)[..., None, None])
        self.register_buffer("scale", std / new_std)
        self.register_buffer("shift", (mean - new_mean) / new_std)
        self.same = given == wanted

    def forward(self, images: Tensor) -> Any:
        return self.module(images if self.same else images * self.scale + self.shift)


def load_network(run: Path) -> Network:
    """The final network of the run folder `run`; ValueError when there is none or its files do not fit together."""
    card = Card.load(run / FILE)
    module = create_model(card.model, num_classes=len(card.class_names), in_channels=card.channels)
    module = _to_channels_last(module).eval()
    if card.stage == "pruned":
        prune(module, PruneConfig(sparsity=0))  # the layers; the masks are among the weights
    elif card.stage == "int8":
        module = quantize(module, [torch.rand(2, card.channels, card.height, card.width)], SKELETON)
    try:
        module.load_state_dict(load_weights(run / WEIGHTS))
    except RuntimeError as error:
        raise ValueError(f"{run / WEIGHTS}: not the weights of {card.model} that {FILE} describes") from error
    return Network(card, module.eval())


def _to_channels_last(module: Any) -> nn.Module:
    moved: nn.Module = module.to(memory_format=torch.channels_last)
    return moved
