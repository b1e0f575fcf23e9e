"""A training that is stopped, by its user, by a loss that is none, and goes on."""

import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import QUICK, TINY, assert_same_weights, files_of, press_ctrl_c_at, results, tiny

from imgopt_fast.training import (
    DivergedError,
    InterruptedTrainingError,
    Report,
    load_weights,
    resume,
    train,
)
from imgopt_fast.training.checkpoint import interruptible, load_checkpoint
from imgopt_fast.training.teachers import Objective

pytestmark = pytest.mark.usefixtures("quick_measurements")


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
    tiny_run: Report, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    images, name = Path(tiny_run.config.data or ""), f"stopped at {step}"
    press_ctrl_c_at(monkeypatch, step)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(images, name, reference_epoch=False))
    stopped = images.parent / "runs" / name
    assert not (stopped / "model.safetensors").exists()
    assert len(resume(stopped).epochs) == 3
    assert results(stopped) == results(tiny_run.path)
    assert_same_weights(stopped, tiny_run.path)


def test_killed_before_the_first_checkpoint_a_training_begins_again(
    tiny_run: Report, caplog: pytest.LogCaptureFixture
) -> None:
    """Also before the images were read: what is there then is config.yaml, and half of another file."""
    caplog.set_level(logging.INFO, "imgopt_fast")
    images = Path(tiny_run.config.data or "")
    killed = images.parent / "runs" / "killed"
    killed.mkdir()
    (killed / ".partial-config.yaml").write_text("lr: ")
    tiny(images, "killed", reference_epoch=False).save(killed / "config.yaml")
    with pytest.raises(ValueError, match="killed: exists already; continue it with --resume"):
        train(tiny(images, "killed"))
    resume(killed)
    assert f"{killed}: stopped before its first checkpoint; begins again" in caplog.messages
    assert results(killed) == results(tiny_run.path)
    assert_same_weights(killed, tiny_run.path)


def test_what_was_learned_before_a_loss_that_is_none_can_be_used(
    few_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(self: Objective, *arguments: Any) -> torch.Tensor:
        return found(self, *arguments) * (math.nan if len(losses) > STEPS else 1.0)

    found, losses = Objective.forward, list[int]()
    monkeypatch.setattr(Objective, "forward", lambda *arguments: losses.append(1) or nothing(*arguments))
    checkpoint = few_images.parent / "runs" / "run" / "checkpoint.pt"
    with pytest.raises(
        DivergedError, match=rf"is nan in epoch 2; .*--lr, from the weights .*--pretrained {checkpoint}"
    ):
        train(tiny(few_images, "run"))
    monkeypatch.undo()
    again = tiny(few_images, "again", pretrained=str(checkpoint), lr=1e-9, **QUICK)
    before = load_checkpoint(checkpoint)["state"]["model"]["8.weight"]
    torch.testing.assert_close(load_weights(train(again).path / "model.safetensors")["8.weight"], before)


def test_what_cannot_be_resumed_is_named(tmp_path: Path) -> None:
    TINY.save(tmp_path / "config.yaml")
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
