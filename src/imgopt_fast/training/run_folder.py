"""The folder of one training. Every file in it is whole: written beside its place, flushed to the disk, then renamed.

The folder is flushed as well, whose entry is what names the file: it would otherwise be the old one after a power cut.
A training that fails before anything worth keeping exists takes its folder away with it; one that is killed before
leaves a folder whose config.yaml is enough to begin again.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial-"  # what the names of unfinished files begin with


class RunFolder:
    """`path`, written to if `writes`: of several processes one alone does."""

    def __init__(self, path: Path, *, writes: bool = True, keep: bool = False) -> None:
        self.path, self.writes = path, writes
        self.keep = keep  # whether there is a checkpoint to resume from

    @classmethod
    @contextmanager
    def create(cls, path: Path, *, writes: bool = True) -> Iterator["RunFolder"]:
        """A new folder at `path`, with the parents it needs; on an error it and the parents made here disappear again.

        An empty folder is taken as new. Raises ValueError when there is anything else at `path`.
        """
        if not writes:
            yield cls(path, writes=False)
            return
        if path.exists() and not _is_empty(path):
            raise ValueError(
                f"{path}: exists already; continue it with --resume, or choose another --experiment or --output"
            )
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
        partial = path.with_name(PARTIAL + name)  # keeps the suffix, by which libraries choose the format
        try:
            writer(partial)
            _flush(partial)
            partial.replace(path)
            _flush(path.parent)
        except OSError as error:
            # A failed write does not name its file by itself.
            more = f"; when that is mended, continue with --resume {self.path}" if self.keep else ""
            raise OSError(error.errno, f"{error.strerror}{more}", str(path)) from error
        finally:
            partial.unlink(missing_ok=True)
        return path


def _is_empty(path: Path) -> bool:
    """A folder with nothing in it but what a killed process left unfinished."""
    return path.is_dir() and all(file.name.startswith(PARTIAL) for file in path.iterdir())


def _flush(path: Path) -> None:
    """Wait until the file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
