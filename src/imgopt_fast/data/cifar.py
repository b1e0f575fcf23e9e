"""Reads CIFAR-10 and CIFAR-100 as published: the "python" and "binary" versions, packed or unpacked.

The python version is pickled. Unpickling runs whatever the file says, so only what these files need is allowed: plain
containers, strings and NumPy arrays.
"""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from imgopt_fast.data.dataset import Arrays, DataError, Dataset, from_arrays

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# The files of a set: those of the training images, that of the test images, that of the class names.
KINDS: dict[str, tuple[list[str], str, str]] = {
    "cifar-10-batches-py": (BATCHES, "test_batch", "batches.meta"),
    "cifar-10-batches-bin": ([f"{name}.bin" for name in BATCHES], "test_batch.bin", "batches.meta.txt"),
    "cifar-100-python": (["train"], "test", "meta"),
    "cifar-100-binary": (["train.bin"], "test.bin", "fine_label_names.txt"),
}
ARCHIVES = ("cifar-10-python", "cifar-10-binary", "cifar-100-python", "cifar-100-binary")
SIDE = 32
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


def is_cifar(path: Path) -> bool:
    """Whether `path` is an archive under its published name, or the folder that one unpacks to."""
    if path.is_dir():
        return _folder(path) is not None
    return path.is_file() and path.name.startswith(ARCHIVES) and path.name.endswith((".tar.gz", ".tgz", ".tar"))


def load_cifar(path: Path, *, validation: float) -> Dataset:
    """The set at `path`. Raises DataError."""
    folder = _folder(path) if path.is_dir() else None
    try:
        if folder is not None:
            kind = folder[1]
            train, test, names = KINDS[kind]
            contents = {name: (folder[0] / name).read_bytes() for name in (*train, test, names)}
        else:
            kind, contents = _unpacked(path)
            train, test, names = KINDS[kind]
        read = _read_pickled if kind.endswith(("py", "python")) else _read_binary
        batches = [read(contents[name], kind) for name in (*train, test)]
        images, labels = np.concatenate([b[0] for b in batches[:-1]]), np.concatenate([b[1] for b in batches[:-1]])
        class_names = _class_names(contents[names])
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from error
    except (ValueError, TypeError, EOFError, pickle.UnpicklingError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: not CIFAR as published, or damaged: {error}") from error
    name = "CIFAR-100" if "100" in kind else "CIFAR-10"
    return from_arrays(name, {"train": (images, labels), "test": batches[-1]}, class_names, validation=validation)


def _folder(path: Path) -> tuple[Path, str] | None:
    for folder in (path, *(path / kind for kind in KINDS)):
        for kind, (train, test, names) in KINDS.items():
            if all((folder / name).is_file() for name in (*train, test, names)):
                return folder, kind
    return None


def _unpacked(path: Path) -> tuple[str, dict[str, bytes]]:
    contents: dict[str, bytes] = {}
    kind = ""
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder in KINDS and member.isfile():
                kind, file = folder, archive.extractfile(member)
                contents[name] = file.read() if file is not None else b""
    train, test, names = KINDS.get(kind, ([], "", ""))
    missing = {*train, test, names} - contents.keys()
    if missing:
        raise ValueError(f"it has no {min(missing) or ' or '.join(KINDS)}")
    return kind, contents


def _read_pickled(data: bytes, kind: str) -> Arrays:
    batch = _unpickle(data)
    labels, pixels = _entry(batch, "labels", "fine_labels"), _entry(batch, "data")
    return pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), np.asarray(labels)


def _read_binary(data: bytes, kind: str) -> Arrays:
    labels = 2 if "100" in kind else 1  # the coarse label comes first
    rows = np.frombuffer(data, np.uint8).reshape(-1, labels + 3 * SIDE**2)
    return rows[:, labels:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), rows[:, labels - 1].astype(np.int64)


def _class_names(data: bytes) -> list[str]:
    if data[:1] in (b"\x80", b"("):  # how pickles begin
        names = _entry(_unpickle(data), "label_names", "fine_label_names")
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    return data.decode().split()


def _entry(stored: Any, *names: str) -> Any:
    """What `stored` has under one of `names`: as bytes in the published files, as text where Python 3 wrote them."""
    for name in names:
        for key in (name.encode(), name):
            if isinstance(stored, dict) and key in stored:
                return stored[key]
    raise ValueError(f"a file of it has no {' and no '.join(names)}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in it")
        return super().find_class(module, name)


def _unpickle(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()
