"""A training that is stopped, by its user, by a loss that is none, and goes on."""

import os
import signal
from pathlib import Path

import pytest
from tiny_training import TINY, assert_same_weights, files_of, make_images, press_ctrl_c_at, results, tiny

from imgopt_fast.training import (
    DivergedError,
    InterruptedTrainingError,
    Report,
    evaluate,
    resume,
    train,
)
from imgopt_fast.training.checkpoint import interruptible


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A whole tiny training, for the tests that only look at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        return train(tiny(make_images(tmp_path_factory.mktemp("shared") / "images"), "run"))


@pytest.fixture(autouse=True)
def _quick_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LEAST_SECONDS", 0.01)


def test_a_diverged_training_says_so_and_leaves_whole_epochs(few_images: Path) -> None:
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in epoch 1; try a lower --lr"):
        train(tiny(few_images, "run", lr=1e30, warmup_epochs=0.0))
    assert not (few_images.parent / "runs").exists()


def test_ctrl_c_in_the_first_epoch_leaves_a_checkpoint(few_images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    press_ctrl_c_at(monkeypatch, 2)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(few_images, "run"))
    assert files_of(few_images.parent / "runs" / "run") == [
        "checkpoint.pt",
        "config.yaml",
    ]


STEPS = 6  # per epoch: 96 of the 120 images or a few less train, in batches of 16


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, 2 * STEPS, 2 * STEPS + 1, 3 * STEPS - 1])
def test_a_resumed_training_ends_with_the_bits_of_one_never_stopped(
    shared: Report, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    images, name = Path(shared.config.data or ""), f"stopped at {step}"
    press_ctrl_c_at(monkeypatch, step)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(images, name, reference_epoch=False))
    stopped = images.parent / "runs" / name
    assert not (stopped / "model.safetensors").exists()
    assert len(resume(stopped).epochs) == 3
    assert results(stopped) == results(shared.path)
    assert_same_weights(stopped, shared.path)


def test_what_cannot_be_resumed_is_named(tmp_path: Path) -> None:
    TINY.save(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: no such checkpoint"):
        resume(tmp_path)
    for content in (b"", b"nothing", b"PK\x03\x04 cut short"):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: not a checkpoint of imgopt-fast"):
            resume(tmp_path)


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    with interruptible() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
