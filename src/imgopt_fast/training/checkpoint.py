"""Where a training stands between two steps, on disk, so that it continues as if nothing had happened."""

import io
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from imgopt_fast.training.report import EpochRow

FILE = "checkpoint.pt"
SECONDS = 60.0  # between checkpoints inside an epoch: what a killed process can lose
GPU_SECONDS = 5.0  # between those after recorded epochs, which can be shorter than it takes to write one


@dataclass
class Position:
    """The next step's stage, epoch and batch; the loss summed over this epoch; the epochs that are complete."""

    stage: str
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    epochs: list[EpochRow] = field(default_factory=list)


def save_checkpoint(path: Path, position: Position, parts: dict[str, Any], random: list[Tensor]) -> None:
    """Write `position`, the state_dict of each of `parts` (model, optimizer, ...) and torch's random state of each
    process."""
    state = {name: part.state_dict() for name, part in parts.items()}
    file = io.BytesIO()  # torch's own writer reports a full disk as something else than an OSError
    torch.save({"position": asdict(position), "rng": random, "state": state}, file)
    path.write_bytes(file.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What save_checkpoint wrote, `position` as a Position; ValueError when the file is none.

    Only tensors and plain values are unpickled (`weights_only`), so a checkpoint from elsewhere runs no code.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        position = checkpoint["position"]
        checkpoint["position"] = Position(**position | {"epochs": [EpochRow(**row) for row in position["epochs"]]})
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such checkpoint") from error
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint of imgopt-fast") from error
    return checkpoint


def restore(checkpoint: dict[str, Any], parts: dict[str, Any], rank: int) -> Position:
    """Load the state of each of `parts`, and the random state of process `rank`; returns the position."""
    for name, part in parts.items():
        part.load_state_dict(checkpoint["state"][name])
    torch.set_rng_state(checkpoint["rng"][rank % len(checkpoint["rng"])])
    position: Position = checkpoint["position"]
    return position


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed or SIGTERM came: a training stops between two steps.

    The second Ctrl-C interrupts at once. Only the main thread can listen to signals; elsewhere nothing changes.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
