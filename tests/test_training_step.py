"""The recorded step of a GPU trains as the eager one does; without a GPU, the function plays its own recording."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress import qat
from imgopt_fast.data import Dataset, load_dataset
from imgopt_fast.models import create_model
from imgopt_fast.training import TrainConfig, step
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.events import Events
from imgopt_fast.training.loop import Fitting, fit
from imgopt_fast.training.report import EpochRow
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import Stage
from imgopt_fast.training.teachers import Teacher

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
CONFIG = TrainConfig(batch_size=64, lr=0.1, epochs=2, amp=False, memory=False)


@pytest.fixture(scope="module")
def data() -> Dataset:
    whole = load_dataset()
    return dataclasses.replace(whole, train=whole.train.first(640), validation=whole.validation.first(200))


def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a processor record steps, which are played by running them again; counts the replays."""
    replays = []

    def record(function: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            replays.append(1)
            function()

        return replay

    monkeypatch.setattr(step, "record", record)
    monkeypatch.setattr("imgopt_fast.training.loop.recordable", lambda *arguments: True)
    return replays


def trained(
    config: TrainConfig, data: Dataset, folder: Path, teacher: nn.Module | None = None, *, aware: bool = False
) -> tuple[list[EpochRow], nn.Module, dict[str, float]]:
    device = torch.device(config.device)
    torch.manual_seed(0)
    model: Any = create_model("resnet8", num_classes=10, in_channels=1)
    model = model.to(device, memory_format=torch.channels_last)
    normalize = Normalize((0.3,), (0.3,))
    if aware:
        model = qat(model.eval(), [normalize(data.train.first(64).images.to(device))])
    augment = Augmentation(config, normalize, 10)
    with RunFolder.create(folder / config.opt, writes=True) as run:
        fitting = Fitting(config, data.to(device), augment, Compose([normalize]), run, Process(), Events(None))
        taught_by = None if teacher is None else Teacher(teacher.to(device).eval(), normalize, (28, 28))
        stage = Stage("dense", 0, config.epochs, config.lr, 0.5, clip_grad=1.0 if aware else None)
        rows = fit(stage, model, fitting, [], teacher=taught_by)
    return rows, model, fitting.times["dense"]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opt": "adamw", "lr": 0.002, "model_ema_decay": 0.9},
        {"mixup": 0.4, "clip_grad": 1.0, "aa": "trivial"},
        {"distill_loss_weight": 0.5},
    ],
    ids=["sgd", "adamw and an average", "mixed and clipped", "distilled"],
)
def test_recorded_steps_train_as_eager_ones(
    data: Dataset, changes: dict[str, Any], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates that change with every step, other images in the same memory, an average that follows."""
    config = dataclasses.replace(CONFIG, device=device, **changes)
    torch.manual_seed(1)
    teacher = create_model("resnet8", num_classes=10, in_channels=1) if "distill_loss_weight" in changes else None
    eager, model, _ = trained(dataclasses.replace(config, cuda_graphs=False), data, tmp_path / "eager", teacher)
    replays = played(monkeypatch) if device == "cpu" else []
    recorded, other, times = trained(config, data, tmp_path / "recorded", teacher)
    assert times["recorded"] > 0
    if device == "cpu":
        assert len(replays) == 2 * 10 - step.EAGER_STEPS
    for ours, expected in zip(recorded, eager, strict=True):
        assert ours.train_loss == pytest.approx(expected.train_loss, rel=1e-4 if device == "cpu" else 0.02)
        assert ours.lr == expected.lr
    if device == "cpu":
        for name, tensor in other.state_dict().items():
            torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_int8_aware_steps_are_recorded(
    data: Dataset, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is evaluated behind each epoch is the int8 network of the weights that the replays left."""
    config = dataclasses.replace(CONFIG, device=device, lr=0.01)
    eager, _, _ = trained(dataclasses.replace(config, cuda_graphs=False), data, tmp_path / "eager", aware=True)
    if device == "cpu":
        played(monkeypatch)
    recorded, model, times = trained(config, data, tmp_path / "recorded", aware=True)
    assert times["recorded"] > 0
    for ours, expected in zip(recorded, eager, strict=True):
        assert ours.train_loss == pytest.approx(expected.train_loss, rel=1e-3 if device == "cpu" else 0.02)
        assert ours.eval_top1 == pytest.approx(expected.eval_top1, abs=0.02 if device == "cpu" else 0.1)
    images = torch.rand(8, 1, 28, 28, device=device)
    assert torch.equal(model.eval()(images), model.convert()(images))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_versions_of_the_weights_tell_that_they_have_changed(
    data: Dataset, opt: str, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed once for a version of a weight would otherwise be out of date: fused optimizers tell nothing."""
    replays = played(monkeypatch) if recorded else []
    _, model, _ = trained(dataclasses.replace(CONFIG, opt=opt, lr=0.002), data, tmp_path)
    assert all(parameter._version >= 20 + len(replays) for parameter in model.parameters())


def test_a_step_that_cannot_be_recorded_goes_on_eagerly(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    played(monkeypatch)

    def refused(function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(step, "record", refused)
    with caplog.at_level("INFO", "imgopt_fast"):
        rows, _, times = trained(CONFIG, data, tmp_path)
    assert "not recorded as a CUDA graph: operation not permitted when stream is capturing" in caplog.text
    assert "recorded" not in times
    assert rows[-1].lr < CONFIG.lr  # a number again


@pytest.mark.parametrize(
    "changes",
    [
        {"l1": 1e-4},
        {"grad_accum_steps": 2},
        {"grad_sampling": 2},
        {"cuda_graphs": False},
        {"torchcompile": "inductor"},
    ],
)
def test_what_the_processor_has_to_see_is_not_recorded(changes: dict[str, Any]) -> None:
    class OnGpu:  # as far as the question goes
        class model:
            @staticmethod
            def parameters() -> Any:
                return iter([type("Parameter", (), {"is_cuda": True})])

        pruner = None
        scaler = torch.amp.GradScaler("cpu", enabled=False)

    updates: Any = OnGpu
    assert step.recordable(CONFIG, updates, Process(), 1)
    config = dataclasses.replace(CONFIG, **changes)
    assert not step.recordable(config, updates, Process(), config.grad_accum_steps)
    assert not step.recordable(CONFIG, updates, Process(0, 2), 1)
