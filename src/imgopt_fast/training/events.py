"""TensorBoard events of a run, where tensorboard is installed (the extra of that name)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgopt_fast.training.report import EpochRow


class Events:
    """Writes scalars into `folder`; without a folder, or without the library, nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder))

    def write(self, row: "EpochRow", seconds: dict[str, float]) -> None:
        """What an epoch gave, and the seconds of each phase of the stage so far."""
        if self._writer is None:
            return
        for name in ("train_loss", "eval_top1", "lr", "density", "images_per_second"):
            self._writer.add_scalar(name, getattr(row, name), row.epoch)
        for phase, value in seconds.items():
            self._writer.add_scalar(f"seconds/{row.stage}/{phase}", value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
