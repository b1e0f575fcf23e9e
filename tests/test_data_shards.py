"""WebDataset shards: found, listed, split, streamed, damaged."""

import io
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import optional, require
from PIL import Image

from imgopt_fast.data import DataError, load_dataset, shards, stable_fraction

pytestmark = pytest.mark.usefixtures("cached")


def write_shards(folder: Path, counts: tuple[int, ...] = (30, 25, 35), *, names: bool = False) -> Path:
    """Shards whose image number i (over all shards) is filled with i and has class i % 3."""
    folder.mkdir()
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"part-{shard:03}.tar", "w") as archive:
            for _ in range(count):
                image = io.BytesIO()
                Image.new("L", (6, 6), number).save(image, "png")
                label = ("ant", "bee", "cat")[number % 3] if names else str(number % 3)
                for suffix, content in (("png", image.getvalue()), ("cls", label.encode())):
                    member = tarfile.TarInfo(f"sample{number:04}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                number += 1
    return folder


@pytest.fixture
def streamed(tmp_path: Path) -> Path:
    optional("webdataset")
    return write_shards(tmp_path / "shards")


def test_shards_are_found_listed_and_split(tmp_path: Path, streamed: Path) -> None:
    data = load_dataset(streamed)
    assert data.class_names == ("0", "1", "2")
    assert data.train.shape == (1, 6, 6)
    keys = [stable_fraction(f"sample{i:04}") for i in range(90)]
    assert data.validation.images[:, 0, 0, 0].tolist() == [i for i in range(90) if keys[i] < 0.1]
    assert data.test.images[:, 0, 0, 0].tolist() == [i for i in range(90) if 0.1 <= keys[i] < 0.2]
    training = [i for i in range(90) if keys[i] >= 0.2]
    assert data.train.first(7).images[:, 0, 0, 0].tolist() == training[:7]
    assert [len(batch) for batch in data.train.in_order(40)] == [40, len(training) - 40]
    for pattern in (f"{streamed}/part-{{000..002}}.tar", f"pipe:cat {streamed}/part-000.tar {streamed}/part-001.tar"):
        assert load_dataset(pattern, image_size=4).train.shape == (1, 4, 4)
    (streamed / "classes.txt").write_text("ant\nbee\ncat\n")
    assert load_dataset(streamed).class_names == ("ant", "bee", "cat")
    named = load_dataset(write_shards(tmp_path / "named", names=True))
    assert named.class_names == ("ant", "bee", "cat")


def test_shards_named_by_their_split(streamed: Path) -> None:
    def values(split: Any) -> list[int]:
        return split.first(len(split)).images[:, 0, 0, 0].tolist()

    keys = [stable_fraction(f"sample{i:04}") for i in range(90)]
    for i, name in enumerate(("set-train-000.tar", "set-train-001.tar", "set-test-000.tar")):
        (streamed / f"part-{i:03}.tar").rename(streamed / name)  # test comes first in the order of names
    data = load_dataset(streamed)
    assert values(data.test) == list(range(55, 90))
    assert values(data.validation) == [i for i in range(55) if keys[i] < 0.1]
    assert values(data.train) == [i for i in range(55) if keys[i] >= 0.1]
    (streamed / "set-train-001.tar").rename(streamed / "set-val.tar")
    data = load_dataset(streamed)
    assert [values(part) for part in (data.train, data.validation, data.test)] == [
        list(range(30)), list(range(30, 55)), list(range(55, 90))
    ]  # fmt: skip
    (streamed / "set-test-000.tar").unlink()
    data = load_dataset(streamed)
    assert values(data.test) == list(range(30, 55))
    assert values(data.validation) == [i for i in range(30) if keys[i] < 0.1]
    assert data.splits.endswith("val is the test")


def test_shards_stream_every_image_once_in_a_new_order(streamed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BUFFER", 16)
    train = load_dataset(streamed).train

    def order(**changes: Any) -> list[list[int]]:
        settings = {"seed": 1, "epoch": 0, **changes}
        batches = list(train.shuffled(8, **settings))
        for index, batch in batches:
            assert batch.images[:, 0, 0, 0].long().equal(index)
            assert batch.labels.equal(index % 3)
        return [index.tolist() for index, _ in batches]

    whole = order(last=True)
    flat = [position for batch in whole for position in batch]
    assert sorted(flat) == train.positions.tolist()
    assert order() == whole[: len(train) // 8] == order()
    assert order(first=3) == whole[3 : len(train) // 8]
    assert order(epoch=1) != order() != order(seed=2)
    assert any(abs(a - b) > 30 for a, b in pairwise(flat))
    halves = [order(share=lambda index, r=r: index[r::2]) for r in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in order()]


def test_damaged_shards(streamed: Path) -> None:
    shard = streamed / "part-001.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as archive:
        damaged = [m for m in archive if m.name.endswith(".png")][:20]
    for member in damaged:
        content[member.offset_data : member.offset_data + 20] = bytes(20)
    shard.write_bytes(content)
    data = load_dataset(streamed)
    held_out = [m for m in damaged if stable_fraction(m.name[:-4]) < 0.2]
    assert {skipped.name for skipped in data.left_out()} >= {m.name[:-4] for m in held_out}  # read when loaded
    seen = sorted(i for index, _ in data.train.shuffled(40, seed=0, epoch=0, last=True) for i in index.tolist())
    assert len(seen) == len(data.train) - (20 - len(held_out))
    assert [skipped.name for skipped in data.left_out()] == sorted(m.name[:-4] for m in damaged)
    assert all("not an image" in skipped.reason for skipped in data.left_out())


def test_shards_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "shards")
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install 'imgopt-fast\[shards\]'"):
        load_dataset(tmp_path / "shards")


def test_the_library_is_there_in_ci() -> None:
    try:
        import webdataset
    except ImportError:
        webdataset = None
    require(webdataset is not None, "webdataset")
    assert torch.get_num_threads() >= 1
