"""Published arrays, and the cache of decoded images."""

import fcntl
import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_data import make_folder

from imgopt_fast.data import DataError, cache, load_dataset, stable_fraction
from imgopt_fast.data.prefetch import prefetched

pytestmark = pytest.mark.usefixtures("cached")


# ------------------------------------------------------------------------------------------------------- arrays


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def arrays(count: int, classes: int = 3) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    labels = np.arange(count, dtype=np.uint8) % classes
    images = np.broadcast_to(labels[:, None, None] * 40, (count, 6, 5)).copy()
    images[:, 0, 0] = np.arange(count)
    return images, labels


@pytest.mark.parametrize(("suffix", "prefix"), [(".gz", ""), ("", "emnist-letters-")])
def test_idx_files(tmp_path: Path, suffix: str, prefix: str) -> None:
    test = "test" if prefix else "t10k"
    for part, count in (("train", 60), (test, 9)):
        images, labels = arrays(count)
        write_idx(tmp_path / f"{prefix}{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{prefix}{part}-labels-idx1-ubyte{suffix}", labels + 1)  # as EMNIST counts
    data = load_dataset(tmp_path)
    assert data.class_names == ("1", "2", "3")
    assert (len(data.test), len(data.train) + len(data.validation)) == (9, 60)
    assert data.train.shape == (1, 6, 5)
    assert (data.train.images[:, 0, 5, 4] // 40).long().equal(data.train.labels)
    again = load_dataset(tmp_path / f"{prefix}train-images-idx3-ubyte{suffix}")
    assert again.train.images.equal(data.train.images)
    with pytest.raises(ValueError, match=r"image_size: .* are 6x5, got 32"):
        load_dataset(tmp_path, image_size=32)
    (tmp_path / f"{prefix}train-labels-idx1-ubyte{suffix}").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte(\.gz)?: No such file"):
        load_dataset(tmp_path)
    write_idx(tmp_path / "other-train-images-idx3-ubyte", images)
    with pytest.raises(DataError, match="holds several sets"):
        load_dataset(tmp_path)


def test_npz_archives(tmp_path: Path) -> None:
    images, labels = arrays(80)
    colour = np.repeat(images[..., None], 3, axis=3)
    np.savez(
        tmp_path / "keras.npz", x_train=colour, y_train=labels[:, None], x_test=colour[:9], y_test=labels[:9, None]
    )
    data = load_dataset(tmp_path / "keras.npz")
    assert data.train.shape == (3, 6, 5)
    assert len(data.test) == 9
    np.savez(tmp_path / "plain.npz", images=images, labels=labels, class_names=["a", "b", "c"])
    data = load_dataset(tmp_path / "plain.npz")
    assert data.class_names == ("a", "b", "c")
    held = [stable_fraction(f"image {i}") for i in range(80)]
    assert data.validation.images[:, 0, 0, 0].tolist() == [i for i in range(80) if held[i] < 0.1]
    assert data.test.images[:, 0, 0, 0].tolist() == [i for i in range(80) if 0.1 <= held[i] < 0.2]
    assert len(data.train) + len(data.validation) + len(data.test) == 80
    np.savez(
        tmp_path / "val.npz", train_images=images, train_labels=labels, val_images=images[:9], val_labels=labels[:9]
    )
    data = load_dataset(tmp_path / "val.npz")
    assert (len(data.test), len(data.train) + len(data.validation)) == (9, 80)
    assert data.splits.endswith("val is the test")
    np.savez(tmp_path / "few.npz", images=images, labels=labels, class_names=["a", "b"])
    with pytest.raises(DataError, match="expected labels from 0 to 1, got 0 to 2"):
        load_dataset(tmp_path / "few.npz")
    np.savez(tmp_path / "floats.npz", images=images / 255, labels=labels)
    with pytest.raises(DataError, match=r"expected uint8 images .* got float64 \(80, 6, 5\)"):
        load_dataset(tmp_path / "floats.npz")
    np.savez(tmp_path / "names.npz", pictures=images)
    with pytest.raises(DataError, match="expected arrays train_images and train_labels, found pictures"):
        load_dataset(tmp_path / "names.npz")
    np.savez(tmp_path / "objects.npz", images=np.array([{}]), labels=labels)
    with pytest.raises(DataError, match=r"objects\.npz: cannot read these arrays"):
        load_dataset(tmp_path / "objects.npz")


def cifar_files(kind: str, per_batch: int = 30) -> Iterator[tuple[str, bytes]]:
    """The files of a set whose image i of a batch is filled with i, red 1 above, of class i % 3."""
    hundred = "100" in kind
    train = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    names = [b"ant", b"bee", b"cat"]
    pixels = np.repeat(np.arange(per_batch, dtype=np.uint8)[:, None], 3072, axis=1)
    pixels[:, :1024] += 1
    labels = np.arange(per_batch) % 3
    for name in (*train, "test" if hundred else "test_batch"):
        if kind.endswith(("bin", "binary")):
            columns = [labels[:, None].astype(np.uint8)] * (2 if hundred else 1)
            yield f"{name}.bin", np.hstack([*columns, pixels]).tobytes()
        else:
            key = b"fine_labels" if hundred else b"labels"
            yield name, pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2)
    if kind.endswith(("bin", "binary")):
        yield "fine_label_names.txt" if hundred else "batches.meta.txt", b"\n".join(names) + b"\n\n"
    else:
        key = b"fine_label_names" if hundred else b"label_names"
        yield "meta" if hundred else "batches.meta", pickle.dumps({key: names}, protocol=0)


CIFAR = {
    "cifar-10-batches-py": "cifar-10-python",
    "cifar-10-batches-bin": "cifar-10-binary",
    "cifar-100-python": "cifar-100-python",
    "cifar-100-binary": "cifar-100-binary",
}


def write_cifar(folder: Path, kind: str) -> Path:
    path = folder / f"{CIFAR[kind]}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in cifar_files(kind):
            member = tarfile.TarInfo(f"{kind}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", CIFAR)
def test_cifar_as_published(tmp_path: Path, kind: str) -> None:
    packed = load_dataset(write_cifar(tmp_path, kind))
    (tmp_path / kind).mkdir()
    for name, content in cifar_files(kind):
        (tmp_path / kind / name).write_bytes(content)
    for path in (tmp_path / kind, tmp_path):
        data = load_dataset(path)
        assert data.class_names == ("ant", "bee", "cat")
        assert data.name == ("CIFAR-100" if "100" in kind else "CIFAR-10")
        assert len(data.test) == 30
        assert len(data.train) + len(data.validation) == (30 if "100" in kind else 150)
        assert data.train.shape == (3, 32, 32)
        blue = data.train.images[:, 2, 5, 7].long()
        assert (blue % 3).equal(data.train.labels)
        assert (blue + 1).equal(data.train.images[:, 0, 31, 0].long())
        assert data.train.images.equal(packed.train.images)


def test_cifar_pickled_again_and_what_is_missing(tmp_path: Path) -> None:
    """Python 3 writes the keys as text."""
    for name, content in cifar_files("cifar-10-batches-py"):
        stored = {key.decode(): value for key, value in pickle.loads(content, encoding="bytes").items()}
        if name == "batches.meta":
            stored["label_names"] = [word.decode() for word in stored["label_names"]]
        (tmp_path / name).write_bytes(pickle.dumps(stored))
    assert load_dataset(tmp_path).class_names == ("ant", "bee", "cat")
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"names": ["ant"]}))
    with pytest.raises(DataError, match="a file of it has no label_names and no fine_label_names"):
        load_dataset(tmp_path)
    with tarfile.open(tmp_path / "cifar-10-python.tar", "w") as archive:
        archive.add(tmp_path / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar: not CIFAR as published, .*: it has no batches\.meta"):
        load_dataset(tmp_path / "cifar-10-python.tar")


def test_cifar_pickles_run_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("touch evil",)

    kind = "cifar-10-batches-py"
    for name, content in cifar_files(kind):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Evil()}, protocol=2))
    with pytest.raises(DataError, match=r"not CIFAR as published, or damaged: .*system has no place in it"):
        load_dataset(tmp_path)
    path = write_cifar(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: "):
        load_dataset(path)


# ------------------------------------------------------------------------------------------------------- the cache


def test_large_sets_are_decoded_once(tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "set", images=40)
    (root / "class0" / "7.png").write_text("no image")
    (root / "class1" / "odd.png").touch()
    direct = load_dataset(root)
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    built = load_dataset(root)
    assert not list(cached.glob("*.partial"))
    monkeypatch.setattr(cache, "decode_into", None)  # nothing is decoded from now on
    mapped = load_dataset(root)
    for data in (built, mapped):
        assert data.skipped == direct.skipped
        assert not data.train.resident
        for part in ("train", "validation", "test"):
            assert getattr(data, part).images.equal(getattr(direct, part).images)
            assert getattr(data, part).labels.equal(getattr(direct, part).labels)
    batches = [
        [(index.tolist(), batch.images.sum().item()) for index, batch in data.train.shuffled(8, seed=1, epoch=2)]
        for data in (direct, mapped)
    ]
    assert batches[0] == batches[1]
    monkeypatch.undo()
    monkeypatch.setenv("IMGOPT_CACHE", str(cached))
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    Image.new("RGB", (12, 12)).save(root / "class0" / "7.png")
    assert [skipped.name for skipped in load_dataset(root).skipped] == ["class1/odd.png"]


def test_pillow_decodes_large_sets_in_processes(tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where simplejpeg does not let go of the interpreter's lock: the pixels and the skipped are those of threads."""
    root = make_folder(tmp_path / "set", images=40)
    (root / "class0" / "7.png").write_text("no image")
    direct = load_dataset(root)
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(cache, "CHUNK", 16)
    built = load_dataset(root)
    assert built.skipped == direct.skipped
    for part in ("train", "validation", "test"):
        assert getattr(built, part).images.equal(getattr(direct, part).images)
    decode_into, here = cache.decode_into, os.getpid()

    def only_elsewhere(data: bytes, pixels: Any) -> Any:
        if os.getpid() == here:
            raise cache.UnreadableError("decoded in the training's own process")
        return decode_into(data, pixels)

    monkeypatch.setattr(cache, "decode_into", only_elsewhere)
    (root / "class0" / "7.png").write_text("another")
    assert load_dataset(root).skipped == direct.skipped  # in processes: PNG
    monkeypatch.setattr(cache, "decode_into", lambda data, pixels: os._exit(1))
    (root / "class0" / "7.png").write_text("a third")
    with pytest.raises(DataError, match="set: a process that decoded its images was killed"):
        load_dataset(root)
    assert not list(cached.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "set", images=40)
    monkeypatch.setattr(cache, "LEAST_BYTES", 0)

    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    data = load_dataset(root)
    assert data.train.resident
    assert "cannot keep the decoded images: No space left on device; they stay in memory" in caplog.text
    assert list(cached.iterdir()) == []


def test_what_a_killed_build_left_goes_with_the_next(
    tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LEAST_BYTES", 1)
    cached.mkdir()
    left, held = cached / "dead.1.partial", cached / "alive.2.partial"
    left.write_bytes(b"half")
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        load_dataset(make_folder(tmp_path / "photos"))
    assert not left.exists()
    assert held.exists(), "another process is at it"


def test_prefetched_items_keep_order_errors_and_stop() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i
            if i == 20:
                raise OSError("gone")

    taken = prefetched(items(), 2)
    assert [next(taken) for _ in range(5)] == [0, 1, 2, 3, 4]
    taken.close()  # type: ignore[attr-defined]
    assert len(made) < 12
    with pytest.raises(OSError, match="gone"):
        list(prefetched(items()))
    assert list(prefetched(iter([]))) == []
