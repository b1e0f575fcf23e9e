"""`imgopt-fast export` on a trained run, and the errors that every format shares."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import optional, require
from torch import nn

import imgopt_fast
from imgopt_fast import targets
from imgopt_fast.cli import main
from imgopt_fast.training import load_network, network
from imgopt_fast.training.network import test_images as images_of

for package in ("onnx", "onnxruntime", "openvino", "jax"):
    optional(package)


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore")  # of qonnx about its own dependencies
@pytest.mark.parametrize("trained", ["trained_run", "trained_bottlenecks_run"])
def test_every_format_of_a_run_keeps_its_accuracy(
    trained: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require(shutil.which("gcc") is not None, "a C compiler")
    few = images_of(request.getfixturevalue(trained)).sample(256)  # XLA takes 7 ms for an image
    monkeypatch.setattr(network, "test_images", lambda run: few)
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(trained), run)
    before = {path.name for path in run.iterdir()}
    assert main(["export", str(run), "--format", "onnx", "c", "stablehlo", "pt2", "qonnx"]) == 0
    table = capsys.readouterr().out
    made = {path.name for path in run.iterdir()} - before
    assert made == {"model.onnx", "model_c", "model_stablehlo", "model.pt2", "model_qonnx.onnx", "export.md"}
    text = (run / "export.md").read_text()
    rows = [line.split("  ") for line in text.splitlines() if "%" in line and "KiB" in line]
    assert [row[0] for row in rows] == ["onnx", "c", "stablehlo", "pt2", "qonnx"]
    loaded = load_network(run)
    right = loaded.module(loaded.card.prepare()(few.images)).argmax(1) == few.labels
    assert right.double().mean() > 0.5  # of ten classes, after an epoch
    accuracy = f"{float(right.double().mean()):.2%}"
    for name in ("stablehlo", "pt2"):
        assert accuracy in next(line for line in table.splitlines() if line.startswith(name + "  "))
    for name in ("c", "qonnx"):
        assert "bit-equal" in next(line for line in table.splitlines() if line.startswith(name + "  "))
    found = next(line for line in table.splitlines() if line.startswith("onnx  "))
    agreement, theirs = (float(cell) for cell in re.findall(r"([0-9.]+)%", found)[-2:])
    assert agreement >= 99.5
    assert abs(theirs - 100 * float(right.double().mean())) <= 0.5


@pytest.mark.filterwarnings("ignore")  # of qonnx about its own dependencies
def test_a_network_of_shifts_goes_as_it_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`quantize --quantize pow2` trains it; what C and QONNX carry is then that network, not another of its floats."""
    require(shutil.which("gcc") is not None, "a C compiler")
    flags = ["--quantize", "pow2", "--qat-epochs", "0", "--no-memory", "--no-reference-epoch"]
    assert main(["quantize", str(run), *flags, "--output", str(tmp_path), "--experiment", "shifts"]) == 0
    few = images_of(run).sample(64)
    monkeypatch.setattr(network, "test_images", lambda run: few)
    monkeypatch.setattr(network, "requantize", None)
    assert main(["export", str(tmp_path / "shifts"), "--format", "c", "qonnx"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "bit-equal" in line]
    assert len(rows) == 2
    loaded = load_network(tmp_path / "shifts")
    right = loaded.module(loaded.card.prepare()(few.images)).argmax(1) == few.labels
    assert all(f"{float(right.double().mean()):.2%}" in row for row in rows)


def test_without_verification(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = run.parent / "elsewhere" / "net.onnx"
    arguments = ["export", str(run), "--format", "onnx", "--qlinear", "--no-verify", "--output", str(where)]
    assert main(arguments) == 0
    assert "not verified" in capsys.readouterr().out
    assert where.stat().st_size > 10_000


def test_help_lists_formats_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    text = capsys.readouterr().out
    for name in ("onnx", "c ", "qonnx", "stablehlo", "pt2"):
        assert f"  {name}" in text
    assert "imgopt-fast[fpga]" in text
    assert "--no-verify" in text


def test_errors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(tmp_path), "--format", "onnx"]) == 2
    assert "not the folder of a finished run" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "c", "--qlinear"]) == 2
    assert "goes with --format onnx" in capsys.readouterr().err
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="format: expected one of"):
        imgopt_fast.export(model, "tflite", tmp_path / "net")
    with pytest.raises(ValueError, match="images: expected a batch"):
        imgopt_fast.export(model, "onnx", tmp_path / "net")
    with pytest.raises(ValueError, match="labels"):
        imgopt_fast.export(model, "onnx", tmp_path / "net", labels=torch.zeros(2))
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnx.*imgopt-fast\[onnx\]"):
        imgopt_fast.export(model, "onnx", tmp_path / "net", images=torch.zeros(1, 3, 4, 4))
