"""How far a stage of a training is: a live line where somebody watches, and where nobody does a line per epoch.

The live line is tqdm's. Its parts are chosen so that they fit into 80 columns, the bar takes what is left.
"""

import logging
import shutil
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from imgopt_fast.training.report import EpochRow

FORMAT = "{desc} {percentage:3.0f}% {bar} {rate_noinv_fmt}, {remaining} left{postfix}"

logger = logging.getLogger("imgopt_fast")


class Progress:
    """Counts images; a context manager. Lines go to the log, whose handler decides whether they are seen."""

    def __init__(self, stage: str, images: int, *, done: int = 0, shown: bool = True) -> None:
        # A terminal that does not know its size (some in containers) says 0 by 0, where tqdm would draw nothing.
        terminal = shutil.get_terminal_size()
        self._stage, self._left, self._lines = stage, images - done, shown and not sys.stderr.isatty()
        self._done, self._began = 0, time.perf_counter()
        self._bar = tqdm(
            total=images,
            initial=done,
            desc=stage,
            unit=" images",
            unit_scale=True,
            ncols=terminal.columns,
            nrows=terminal.lines,
            bar_format=FORMAT,
            disable=None if shown else True,
        )

    def advance(self, images: int) -> None:
        self._done += images
        self._bar.update(images)

    def epoch(self, number: int, of: int, row: "EpochRow", *, wait: float) -> None:
        """What epoch `number` of the stage gave; `wait` is the share of its time that went into waiting for data."""
        found = f"loss {row.train_loss:.3f}, val {row.eval_top1:.1%}, wait {wait:.1%}"
        self._bar.set_postfix_str(found, refresh=False)
        if self._lines:
            seconds = (time.perf_counter() - self._began) * (self._left - self._done) / max(1, self._done)
            left = tqdm.format_interval(seconds) if self._done else "?"  # an epoch that was resumed at its end
            logger.info(f"{self._stage} {number}/{of}: {row.images_per_second:,.0f} images/s, {left} left, {found}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
