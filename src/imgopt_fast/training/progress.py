"""One live line per stage of a training: images per second and the time left. Silent where nobody watches."""

import shutil
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts images; a context manager. tqdm shows nothing when stderr is not a terminal."""

    def __init__(self, stage: str, images: int, *, done: int = 0, shown: bool = True) -> None:
        # A terminal that does not know its size (some in containers) says 0 by 0, where tqdm would draw nothing.
        terminal = shutil.get_terminal_size()
        self._bar = tqdm(
            total=images,
            initial=done,
            desc=stage,
            unit=" images",
            unit_scale=True,
            ncols=terminal.columns,
            nrows=terminal.lines,
            disable=None if shown else True,
        )

    def advance(self, images: int) -> None:
        self._bar.update(images)

    def note(self, **values: str) -> None:
        """Shown at the end of the line."""
        self._bar.set_postfix(values, refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
