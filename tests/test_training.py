"""The training's parts, and the whole of it on a few images: files, determinism, resumption, errors."""

import dataclasses
import io
import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_training import TINY, assert_same_weights, files_of, results, tiny
from torch import nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress.quantize import LayerReport, QuantizationReport
from imgopt_fast.data import Split
from imgopt_fast.nn import Int8Segment
from imgopt_fast.training import (
    Report,
    TrainConfig,
    figures,
    load_network,
    load_weights,
    recipe,
    save_weights,
    train,
)
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.evaluate import accuracy, density, measure_speed, predictions
from imgopt_fast.training.network import Card
from imgopt_fast.training.optimizers import learning_rate
from imgopt_fast.training.progress import Progress
from imgopt_fast.training.report import EpochRow
from imgopt_fast.training.stages import Stage, planned, title

pytestmark = pytest.mark.usefixtures("quick_measurements")


# ------------------------------------------------------------------------------------------------------- the whole


def test_a_training_writes_its_folder_and_reports_three_networks(tiny_run: Report) -> None:
    report = tiny_run
    assert files_of(report.path) == [
        "checkpoint.pt",
        "config.yaml",
        "confusion.png",
        "curves.png",
        "dense.safetensors",
        "layers.png",
        "mistakes.png",
        "model.safetensors",
        "network.yaml",
        "pruned.safetensors",
        "report.html",
        "report.md",
        "samples.png",
        "summary.csv",
    ]
    assert [row.stage for row in report.epochs] == ["dense", "dense", "pruned"]
    assert [row.stage for row in report.stages] == ["dense", "pruned", "int8"]
    dense, pruned, int8 = report.stages
    assert dense.density == 1
    assert pruned.density == pytest.approx(int8.density, abs=0.05)
    assert pruned.density < 0.3
    assert int8.file_bytes < dense.file_bytes
    assert report.reference_seconds is not None
    table = report.table()
    for word in ("accuracy", "density", "latency", "images/s", "dense float", "pruned", "int8", "plain PyTorch"):
        assert word in table
        assert table in (report.path / "report.md").read_text()
    assert TrainConfig.load(report.path / "config.yaml") == report.config


def test_same_seed_same_result_and_another_seed_another(tiny_run: Report) -> None:
    images = Path(tiny_run.config.data or "")
    again = train(tiny(images, "again", reference_epoch=False)).path
    other = train(tiny(images, "other", reference_epoch=False, seed=1)).path
    assert results(again) == results(tiny_run.path)
    assert_same_weights(again, tiny_run.path)
    assert results(other) != results(tiny_run.path)


def test_the_test_images_decide_nothing(few_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every accuracy before the end is measured on the validation images."""
    from imgopt_fast.training import loop

    asked: list[int] = []

    def spy(model: nn.Module, split: Split, prepare: Compose, **others: Any) -> float:
        asked.append(split.labels.data_ptr())
        return accuracy(model, split, prepare, **others)

    monkeypatch.setattr(loop, "accuracy", spy)
    monkeypatch.setattr(recipe, "accuracy", spy)
    report = train(tiny(few_images, "run", reference_epoch=False))
    test = report.dataset.test.labels.data_ptr()
    assert asked.count(test) == 3
    assert asked[-3:] == [test] * 3


def test_fewer_images_than_a_batch_are_one_batch(few_images: Path) -> None:
    report = train(tiny(few_images, "run", batch_size=1000, epochs=1))
    assert report.epochs[0].images_per_second > 0
    assert report.reference_seconds is not None


def test_a_network_that_does_not_fit_the_images_is_named(few_images: Path) -> None:
    """Before the run folder has anything in it, and in one line."""
    for model, size, words in (
        ("small_networks:no_batch_norm", 16, r"16x16 pixels and 1 channels: mat1 and mat2 shapes cannot be multiplied"),
        (f"{__name__}:two_dimensional", 12, r"expected logits of shape \(2, 3\) for two images, got \(2, 3, 12, 12\)"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            train(tiny(few_images, "run", model=model, img_size=size))
        assert "\n" not in str(caught.value)
        assert not (few_images.parent / "runs").exists()


def two_dimensional(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, num_classes, 1)


def test_a_device_that_is_not_there_is_named(few_images: Path) -> None:
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device: cannot use '{device}'"):
            train(tiny(few_images, "run", device=device))


QUICK: dict[str, Any] = {"epochs": 1, "prune_epochs": 0, "quantize": "none", "reference_epoch": False}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rand": {"aa": "rand"},
    "trivial": {"aa": "trivial"},
    "erasing": {"reprob": 1.0},
    "mixing": {"mixup": 0.4, "cutmix": 1.0},
    "adam": {"opt": "adam", "lr": 0.002},
    "adamw": {"opt": "adamw", "lr": 0.002},
    "steps": {"sched": "step", "decay_epochs": 0.5},
    "averaged": {"model_ema_decay": 0.9},
    "accumulated": {"grad_accum_steps": 3},
    "whole set": {"opt": "gd"},
    "proximal": {"l1": 0.05},
    "sampled": {"grad_sampling": 2},
    "layer-wise": {"layer_decay": 0.5},
    "clipped": {"clip_grad": 0.01},
}


def test_every_way_to_train_differs_and_repeats(tiny_run: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "write_report", lambda *arguments: None)  # the figures take longer than the training
    images = Path(tiny_run.config.data or "")
    found = {name: results(train(tiny(images, name, **QUICK, **way)).path) for name, way in WAYS.items()}
    assert len({str(rows) for rows in found.values()}) == len(WAYS)
    for name in ("trivial", "mixing", "sampled"):
        assert results(train(tiny(images, f"{name} again", **QUICK, **WAYS[name])).path) == found[name]


def test_stages_can_be_left_out(few_images: Path) -> None:
    report = train(tiny(few_images, "dense", sparsity=0.0, quantize="none", reference_epoch=False))
    assert [row.stage for row in report.stages] == ["dense"]
    assert not (report.path / "pruned.safetensors").exists()
    assert "dense" in report.table()


@pytest.mark.parametrize("last", ["dense", "pruned", "int8", "pow2"])
def test_a_network_comes_back_from_its_run_folder(few_images: Path, last: str) -> None:
    changes = {"prune_epochs": int(last != "dense"), "quantize": last if last in ("int8", "pow2") else "none"}
    report = train(tiny(few_images, "run", reference_epoch=False, qat_epochs=int(last == "pow2"), **changes))
    network = load_network(report.path)
    assert network.card.stage == ("int8" if last == "pow2" else last)
    assert network.card.power_of_two == (last == "pow2")
    if last == "pow2":
        segments = [module for module in network.module.modules() if isinstance(module, Int8Segment)]
        assert {segment.requantize for segment in segments} == {"shift"}
    assert network.card.class_names == ("class0", "class1", "class2")
    test = report.dataset.test
    probabilities = network.probabilities(test.images)
    assert probabilities.sum(dim=1).allclose(torch.ones(len(test)))
    assert (probabilities.argmax(dim=1) == test.labels).sum().item() / len(test) == report.stages[-1].test_top1
    found = predictions(network.module, test, network.card.prepare())
    assert found.equal(report.found)
    assert found.equal(probabilities.argmax(dim=1))


def test_a_teacher_is_heard(tiny_run: Report) -> None:
    images, teacher = Path(tiny_run.config.data or ""), str(tiny_run.path)
    taught = train(tiny(images, "taught", distill=teacher, **QUICK)).path
    alone = train(tiny(images, "alone", **QUICK)).path
    deaf = train(tiny(images, "deaf", distill=teacher, distill_loss_weight=0.0, **QUICK)).path
    assert results(taught) != results(alone)
    assert results(deaf) == results(alone)


def test_a_teacher_sees_the_students_view_in_its_own_normalization(few_images: Path) -> None:
    report = train(tiny(few_images, "run", prune_epochs=0, quantize="none", reference_epoch=False))
    teacher = load_network(report.path).as_teacher(report.dataset)
    images, labels = report.dataset.train.images[:9], report.dataset.train.labels[:9]
    key = (3, 1, torch.arange(9))
    config = dataclasses.replace(report.config, mixup=0.4, cutmix=1.0, aa="rand", reprob=0.5)
    student = Augmentation(config, Normalize((0.3,), (0.2,)), 3)
    theirs = Augmentation(config, teacher.normalize, 3)(images, labels, key)
    view = student(images, labels, key)
    assert not view.images.allclose(theirs.images)
    replayed = student.replay(view, teacher.normalize, teacher.size)
    torch.testing.assert_close(replayed, theirs.images)
    assert student.replay(view, student.normalize, teacher.size) is view.images
    assert student.replay(view, student.normalize, (24, 20)).shape[2:] == (24, 20)
    part = student(images[3:], labels[3:], (3, 1, torch.arange(3, 9)), halo=2)
    torch.testing.assert_close(part.images, view.images[5:])
    torch.testing.assert_close(part.targets, view.targets[5:])
    torch.testing.assert_close(student.replay(part, teacher.normalize, teacher.size), replayed[5:])
    three = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    colour = dataclasses.replace(report.dataset, train=Split(three, torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(ValueError, match="distill: expected a teacher of the 3 classes and 3 channels"):
        load_network(report.path).as_teacher(colour)


def test_a_folder_without_a_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not the folder of a finished run, it has no network\.yaml"):
        load_network(tmp_path)
    (tmp_path / "network.yaml").write_text("nothing")
    with pytest.raises(ValueError, match=r"network\.yaml: not the description of a network"):
        load_network(tmp_path)
    Card(TINY.model, "dense", ("a", "b"), 1, 8, 8, (0.5,), (0.5,)).save(tmp_path / "network.yaml")
    save_weights({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not the weights of .*tiny_network"):
        load_network(tmp_path)


# ------------------------------------------------------------------------------------------------------- the parts


def test_learning_rate_rises_and_falls() -> None:
    stage = Stage("dense", 3, 10, 0.4, 2.0)
    for sched in ("cosine", "linear"):
        rates = [learning_rate(step, stage, 7, TrainConfig(sched=sched)) for step in range(71)]
        assert rates[:15] == sorted(rates[:15])
        assert rates[14:] == sorted(rates[14:], reverse=True)
        assert rates[14] == pytest.approx(1)
        assert rates[70] == pytest.approx(0)
        assert rates[42] == pytest.approx(0.5)
    steps = TrainConfig(sched="step", decay_epochs=4, decay_rate=0.2)
    rates = [learning_rate(step, stage, 7, steps) for step in range(70)]
    assert rates[14:28] == [1.0] * 14
    assert rates[28:56] == pytest.approx([0.2] * 28)
    assert rates[56:] == pytest.approx([0.04] * 14)
    assert learning_rate(0, dataclasses.replace(stage, warmup_epochs=0.0), 7, TrainConfig()) == 1


@pytest.mark.parametrize("epochs", [1, 2, 7, 8, 20])
def test_the_rate_comes_down_again_however_few_the_epochs(epochs: int) -> None:
    (stage,) = planned(TrainConfig(epochs=epochs, sparsity=0.0, quantize="none", lr=0.4))
    assert stage.warmup_epochs == min(2.0, epochs / 4)
    rates = [learning_rate(step, stage, 100, TrainConfig()) for step in range(100 * epochs)]
    assert max(rates) > 0.97
    assert rates[-1] < 0.001


def test_stages_are_called_what_they_are() -> None:
    taught = TrainConfig(distill="runs/large")
    assert title("dense", TrainConfig()) == "dense float"
    assert title("dense", taught) == "dense, distilled"
    assert title("dense", dataclasses.replace(taught, distill_loss_weight=0.0)) == "dense float"
    assert title("dense", dataclasses.replace(taught, pretrained="runs/first", epochs=0)) == "dense float"
    assert [title(stage, taught) for stage in ("pruned", "distilled", "int8")] == ["pruned", "distilled", "int8"]


def test_weights_come_back_bit_for_bit_and_zeros_cost_a_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 30, generator=generator)
    sparse = torch.where(torch.rand(40, 30, generator=generator) < 0.2, values, 0)  # no -0.0, which is a value
    mask = torch.rand(5, 7, 3, 3, generator=generator) < 0.1
    masked = torch.randn(5, 7, 3, 3, generator=generator) * mask
    masked[mask.nonzero()[0].tolist()[0], :, 0, 0] = 0.0  # a weight may be zero without being pruned
    weights = {
        "dense": torch.randn(17, 3, generator=generator),
        "sparse": sparse,
        "channels_last": sparse.view(4, 10, 6, 5).contiguous(memory_format=torch.channels_last),
        "int8": (sparse * 50).to(torch.int8),
        "conv": masked,
        "conv_mask": mask,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "zeros": torch.zeros(1000),
    }
    path = tmp_path / "weights.safetensors"
    save_weights(weights, path)
    loaded = load_weights(path)
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor), name
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "dense" in stored
    assert stored["sparse.bits"].nbytes + stored["sparse.values"].nbytes < 0.3 * sparse.nbytes
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"weights\.safetensors: not a weight file"):
        load_weights(path)


def test_accuracy_counts_what_is_right() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).repeat(1, 1, 2, 2)

    class Brightness(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            brighter = (x.mean(dim=(1, 2, 3)) > 19.5 / 255).float()
            return torch.stack([1 - brighter, brighter], dim=1)

    split = Split(images, (torch.arange(30) >= 14).long())
    assert accuracy(Brightness(), split, Compose([Normalize((0.0,), (1.0,))]), batch_size=7) == 24 / 30


def test_figures_are_drawn_for_any_number_of_classes_and_mistakes(tmp_path: Path) -> None:
    for classes, channels in ((2, 1), (30, 3)):
        split = Split(torch.zeros(40, channels, 6, 6, dtype=torch.uint8), torch.arange(40) % classes)
        names = [f"class{i}" for i in range(classes)]
        for found in (split.labels, split.labels.flip(0)):
            figures.confusion(tmp_path / "confusion.png", split.labels, found, names)
            figures.mistakes(tmp_path / "mistakes.png", split, found, names)
            for name in ("confusion.png", "mistakes.png"):
                with Image.open(tmp_path / name) as image:
                    assert min(image.size) > 200


def test_layers_are_drawn_for_any_number_and_exact_ones(tmp_path: Path) -> None:
    for count in (0, 1, 70):
        rows = [LayerReport(f"layer{i}", "conv2d", "int8", "", 9, 0.01, 64, 40.0 - i) for i in range(count)]
        rows += [
            LayerReport("zeros", "linear", "int8", "", 9, 0.1, 64, math.inf),
            LayerReport("silu", "silu", "", "", 0),
        ]
        figures.layers(tmp_path / "layers.png", QuantizationReport(rows, 1))
        with Image.open(tmp_path / "layers.png") as image:
            assert image.size[0] > 900
            assert image.size[1] > 150 + 15 * count


def test_progress_shows_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return watched

    for watched in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with Progress("distilled", 100_000) as progress:
            progress.advance(40_000)
            progress.epoch(1, 2, EpochRow(1, "dense", 0.5, 0.853, 0.1, 1.0, 2.0, 1234.0), wait=0.102)
            time.sleep(0.2)  # beyond the interval at which the line is drawn
            progress.advance(60_000)
        shown = sys.stderr.getvalue()
        if watched:
            last = shown.rstrip().rpartition("\r")[2]
            assert len(last) <= 80
            for word in ("distilled 100%", "images/s", "left", "loss 0.500", "val 85.3%", "wait 10.2%"):
                assert word in last
        else:
            assert shown == ""


def test_where_nobody_watches_each_epoch_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "imgopt_fast")
    row = EpochRow(3, "pruned", 0.5, 0.853, 0.1, 1.0, 2.0, 1234.0)
    for shown in (True, False):
        with Progress("pruned", 1000, done=200, shown=shown) as progress:
            progress.advance(400)
            progress.epoch(1, 3, row, wait=0.002)
    (line,) = caplog.messages
    assert re.fullmatch(r"pruned 1/3: 1,234 images/s, 00:0\d left, loss 0.500, val 85.3%, wait 0.2%", line)


def test_density_counts_weights_only() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.zero_()
    assert density(model) == pytest.approx(16 / 20)


def test_measured_speed_is_positive_and_consistent() -> None:
    speed = measure_speed(nn.Flatten(), torch.rand(8, 1, 4, 4))
    assert speed.latency > 0
    assert speed.images_per_second > 0
