"""The image files below a folder or inside a zip archive, by name; an archive is read in place."""

import io
import os
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

from imgopt_fast.data.dataset import DataError

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


class ImageFiles(Protocol):
    """`names` are relative, with forward slashes, and sorted: the order of a directory listing is not defined."""

    root: Path
    names: list[str]

    def open(self, name: str) -> Path | io.BytesIO:
        """What an image library opens; may be called from several threads at once."""


def list_images(root: Path) -> ImageFiles:
    """The image files of the folder or zip archive `root`. Raises DataError when it is neither, or cannot be read."""
    try:
        if root.is_dir():
            return _Folder(root)
        if zipfile.is_zipfile(root):
            return _Archive(root)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{root}: {getattr(error, 'strerror', None) or error}") from error
    raise DataError(f"{root}: {'neither a folder nor a zip archive' if root.exists() else 'no such folder or archive'}")


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: list[str] = []

        def fail(error: OSError) -> None:
            raise error

        for folder, _, files in os.walk(root, onerror=fail, followlinks=True):
            where = Path(folder).relative_to(root)
            self.names += [(where / file).as_posix() for file in files if _is_image(where / file)]
        self.names.sort()

    def open(self, name: str) -> Path:
        return self.root / name


class _Archive:
    def __init__(self, root: Path) -> None:
        self.root = root
        self._archive = zipfile.ZipFile(root)
        self.names = sorted(name for name in self._archive.namelist() if _is_image(Path(name)))

    def open(self, name: str) -> io.BytesIO:
        try:
            return io.BytesIO(self._archive.read(name))
        except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{self.root / name}: cannot read this image: {error}") from error


def _is_image(path: Path) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden
