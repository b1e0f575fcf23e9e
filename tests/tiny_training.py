"""A training of seconds, for the tests: its network, its images, and what to compare of two runs."""

import csv
import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from imgopt_fast.training import TrainConfig, load_weights
from imgopt_fast.training.progress import Progress

# Seconds, not minutes: two epochs of a network of one stage on the images of `few_images`.
TINY = TrainConfig(
    model=f"{__name__}:tiny_network",
    epochs=2,
    prune_epochs=1,
    qat_epochs=0,
    batch_size=16,
    calibration=32,
    warmup_epochs=1,
    lr=0.1,
    memory=False,
)
# A single stage, without what is measured beside it.
QUICK: dict[str, Any] = {"epochs": 1, "prune_epochs": 0, "quantize": "none", "reference_epoch": False, "amp": False}


def tiny_network(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


def make_images(folder: Path) -> Path:
    """A class folder of three classes that brightness tells apart."""
    for c in range(3):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(40):
            noise = Image.effect_noise((12, 12), 20)
            noise.point(lambda v, c=c: v // 2 + 60 * c).save(folder / f"class{c}" / f"{i}.png")
    return folder


def tiny(few_images: Path, name: str, **changes: Any) -> TrainConfig:
    where = {"data": str(few_images), "output": str(few_images.parent / "runs"), "experiment": name}
    return dataclasses.replace(TINY, **where, **changes)


def results(folder: Path) -> list[list[str]]:
    """The lines of summary.csv without its two timing columns."""
    with (folder / "summary.csv").open(newline="") as file:
        return [row[:-2] for row in csv.reader(file)]


def files_of(folder: Path) -> list[str]:
    """Without TensorBoard's, which depend on what is installed."""
    return sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name)


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("dense", "pruned", "model"):
        first, second = (load_weights(folder / f"{name}.safetensors") for folder in (one, other))
        assert first.keys() == second.keys()
        assert all(first[key].equal(second[key]) for key in first), name


def press_ctrl_c_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """From step number `step` on, counted over all trainings, SIGINT arrives after the step."""
    advance, steps = Progress.advance, 0

    def press(self: Progress, images: int) -> None:
        nonlocal steps
        advance(self, images)
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "advance", press)
