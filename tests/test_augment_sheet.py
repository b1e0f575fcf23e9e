"""`imgopt-fast augment`: the contact sheet, and what it says to bad arguments."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgopt_fast.augment import RandomAffine
from imgopt_fast.cli import augment as verb


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, shape in enumerate(((30, 40, 3), (50, 20, 3), (25, 25, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    return verb.run(parser.parse_args(["augment", *map(str, arguments)]))


def test_a_sheet(photos, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert run(photos, "--out", out, "--draws", 2, "--size", 40, "--count", 2) == 0
    assert "2 images, 2 draws of RandomResizedCrop(40" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width == 3 * 40 + 4 * 6
        assert sheet.height > 2 * 40
        first = np.asarray(sheet.crop((6, 6 + 13, 46, 46 + 13)))
    assert first.std() > 10  # the picture is there, not only paper
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "sheet.png"]


def test_a_sheet_of_a_pipeline_given_in_words(photos, tmp_path):
    out = tmp_path / "sheet.jpg"
    pipeline = ("-t", "RandAugment(2)", "-t", "Resize((20, 30))", "-t", "Normalize([0.5] * 3, [0.2] * 3)")
    with pytest.raises(ValueError, match="malformed"):
        run(photos / "0.png", "--out", out, *pipeline)
    pipeline = (*pipeline[:-1], "Normalize([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])")
    assert run(photos / "0.png", photos / "1.png", "--out", out, "--draws", 1, *pipeline) == 0
    assert out.exists()


def test_transforms_are_parsed_not_evaluated():
    transform = verb.parse_transform(" RandomAffine(10, scale=(0.5, 1.5)) ")
    assert isinstance(transform, RandomAffine)
    assert transform.scale == (0.5, 1.5)
    assert verb.parse_transform("RandomHorizontalFlip").p == 0.5
    for call in (
        "print('x')",
        "Compose([])",
        "RandomAffine(",
        "RandomAffine(open('x'))",
        "RandomAffine(**{})",
        "1 + 1",
    ):
        with pytest.raises(ValueError, match="--transform"):
            verb.parse_transform(call)


def test_bad_arguments_are_named(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    out = tmp_path / "sheet.png"
    for arguments, text in (
        ((photos, "--out", out, "--draws", 0), "--draws"),
        ((photos, "--out", tmp_path / "sheet"), "--out"),
        ((photos, "--out", tmp_path / "missing" / "sheet.png"), "--out: no such folder"),
        ((tmp_path / "empty", "--out", out), "no images"),
        ((tmp_path / "text.png", "--out", out), "not an image"),
    ):
        with pytest.raises(ValueError, match=text):
            run(*arguments)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere.png", "--out", out)
    assert not out.exists()
