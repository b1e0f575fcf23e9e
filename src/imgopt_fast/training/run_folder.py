"""The folder of one training. Every file in it is whole: written beside its place, flushed to the disk, then renamed.

The folder is flushed as well, whose entry is what names the file: it would otherwise be the old one after a power cut.
A training that fails before anything worth keeping exists takes its folder away with it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class RunFolder:
    """`path`, written to if `writes`: of several processes one alone does."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.keep = False  # from the first checkpoint on

    @classmethod
    @contextmanager
    def create(cls, path: Path, *, writes: bool = True) -> Iterator["RunFolder"]:
        """A new folder at `path`, with the parents it needs; on an error the folders made here disappear again.

        Raises ValueError when `path` exists.
        """
        if not writes:
            yield cls(path, writes=False)
            return
        if path.exists():
            raise ValueError(f"{path}: exists already; choose another --experiment or --output")
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for folder in made:
                _flush(folder.parent)
            yield run
        except BaseException:
            if not run.keep:
                shutil.rmtree(path, ignore_errors=True)
                for parent in made[1:]:
                    with suppress(OSError):  # somebody else put something there
                        parent.rmdir()
            raise

    def write(self, name: str, writer: Callable[[Path], object]) -> Path:
        """The file `name`, made by `writer(path)`: the old one or the new one, at every moment, never a part."""
        path = self.path / name
        if not self.writes:
            return path
        partial = path.with_name(f".partial-{name}")  # keeps the suffix, by which libraries choose the format
        try:
            writer(partial)
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        except OSError as error:
            # A failed write does not name its file by itself.
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            partial.unlink(missing_ok=True)
        return path


def _flush(path: Path) -> None:
    """Wait until the file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
