"""The command line as a new user meets it, in a folder of its own.

What depends on the process (exit codes, signals, a full disk, a terminal that is none) runs in one; the rest calls
`main`, which saves the seconds that importing torch costs each time.
"""

import argparse
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import require
from PIL import Image

from imgopt_fast.cli import main
from imgopt_fast.cli.train import add_options
from imgopt_fast.training import evaluate
from imgopt_fast.training.checkpoint import load_checkpoint

TINY = [
    "--epochs",
    "2",
    "--prune-epochs",
    "1",
    "-b",
    "32",
    "--warmup-epochs",
    "1",
    "--calibration",
    "32",
    "--qat-epochs",
    "0",
]
TINY += ["--no-memory"]


def imgopt_fast(*arguments: str, cwd: Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; `largest_file` bytes may be written per file, which fails as a full disk does."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "imgopt_fast", *arguments]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300, preexec_fn=limit)


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A class folder beside which the test runs."""
    for c, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "images" / colour).mkdir(parents=True)
        for i in range(40):
            Image.effect_noise((20, 16), 30 + 40 * c).save(tmp_path / "images" / colour / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "LEAST_SECONDS", 0.01)
    return tmp_path / "images"


def columns(run: Path) -> list[list[str]]:
    """summary.csv without its timing columns."""
    return [line.split(",")[:6] for line in (run / "summary.csv").read_text().splitlines()]


def test_a_folder_of_images_becomes_three_networks(
    images: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    where = images.parent
    result = imgopt_fast("train", "images", *TINY, "--img-size", "16", "--experiment", "first", cwd=where)
    assert result.returncode == 0, result.stderr
    about, *epochs = result.stderr.splitlines()  # no terminal: a line per epoch
    assert re.fullmatch(
        r"images: 3 classes; \d+ training, \d+ validation, \d+ test images "
        r"\(validation and test taken from the training images\), grey, 16x16, in memory; batches of 32",
        about,
    )
    assert [line.partition(":")[0] for line in epochs] == ["dense 1/2", "dense 2/2", "pruned 1/1"]
    for line in epochs:
        assert re.search(r"[\d,]+ images/s, \d\d:\d\d left, loss \d\.\d+, val [\d.]+%, wait [\d.]+%$", line)
    for word in ("dense float", "pruned", "int8", "plain PyTorch loop", "runs/first"):
        assert word in result.stdout
    run = where / "runs" / "first"
    for name in ("config.yaml", "summary.csv", "model.safetensors", "curves.png", "report.md"):
        assert (run / name).stat().st_size > 0
    with Image.open(run / "curves.png") as curves:
        assert curves.size[0] > 500
    assert [path for path in run.iterdir() if path.name.startswith(".")] == []

    # The written configuration repeats the run, from another folder as well, and a flag overrides it.
    flags = ["--experiment", "again", "--no-reference-epoch"]
    (where / "elsewhere").mkdir()
    monkeypatch.chdir(where / "elsewhere")
    assert main(["train", "--config", "../runs/first/config.yaml", *flags]) == 0
    monkeypatch.chdir(where)
    again = where / "elsewhere" / "runs" / "again"
    assert columns(run) == columns(again)
    config = yaml.safe_load((again / "config.yaml").read_text())
    assert (config["experiment"], config["reference_epoch"], config["img_size"]) == ("again", False, 16)

    # What was trained can be used.
    capfd.readouterr()
    assert main(["predict", "runs/first", "images/red/0.jpg", "images/blue/1.jpg", "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == ["images/red/0.jpg", "images/blue/1.jpg"]
    assert sum(lines[0]["probabilities"].values()) == pytest.approx(1)
    assert main(["predict", "runs/first", "images/red/0.jpg", "--top", "1"]) == 0
    assert capfd.readouterr().out.count("%") == 1
    # An image that cannot be read does not hide the others.
    assert main(["predict", "runs/first", "runs/first/config.yaml", "images/red/0.jpg", "--top", "1"]) == 2
    out, err = capfd.readouterr()
    assert (out.count("%"), len(err.splitlines()), "config.yaml" in err) == (1, 1, True)
    assert main(["eval", "runs/first"]) == 0
    assert capfd.readouterr().out.splitlines()[0].split("%")[0] + "%" in result.stdout
    assert main(["eval", "runs/first", "images"]) == 0
    assert "of 120 images" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing"], ["missing", "no such folder"]),
        (["train", "--config", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["train", "images", "--lr", "-1"], ["lr: expected a number that is not negative, got -1.0"]),
        (["train", "images", "--model", "resnet9"], ["model: expected one of resnet8", "got 'resnet9'"]),
        (["train", "images", "--experiment", "taken"], ["runs/taken", "exists already"]),
        (["train", "--resume", "runs/taken"], ["runs/taken/config.yaml", "No such file"]),
        (["train", "--resume", "runs/taken", "--lr", "1"], ["--resume", "goes with no other flag"]),
        (["predict", "runs/taken", "images/red/0.jpg"], ["runs/taken", "not the folder of a finished run"]),
        (["eval", "runs/taken"], ["runs/taken", "not the folder of a finished run"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    images: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    (images.parent / "runs" / "taken").mkdir(parents=True)
    (images.parent / "runs" / "taken" / "notes.txt").touch()
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert [path.name for path in (images.parent / "runs").rglob("*")] == ["taken", "notes.txt"]


def test_an_unreadable_image_is_left_out_and_named(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (images / "blue" / "bad.jpg").write_text("no image")
    assert main(["train", "images", *TINY, "--no-reference-epoch", "--img-size", "16", "--experiment", "run"]) == 0
    run = images.parent / "runs" / "run"
    for name in ("report.md", "report.html"):
        assert "blue/bad.jpg" in (run / name).read_text()
    capfd.readouterr()
    assert main(["eval", "runs/run", "images"]) == 0
    out, err = capfd.readouterr()
    assert "of 120 images" in out
    assert err == "left out blue/bad.jpg: not an image file, or damaged\n"


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(images: Path) -> None:
    # Enough for the configuration and not for a checkpoint.
    result = imgopt_fast("train", "images", *TINY, cwd=images.parent, largest_file=10_000)
    assert result.returncode == 2
    about, epoch, error = result.stderr.splitlines()
    assert "3 classes" in about
    assert epoch.startswith("dense 1/2")
    assert "checkpoint.pt: File too large" in error
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_ctrl_c_leaves_a_checkpoint(images: Path) -> None:
    where = images.parent
    command = [sys.executable, "-m", "imgopt_fast", "train", "images", "--epochs", "10000", "--experiment", "run"]
    process = subprocess.Popen(command, cwd=where, text=True, stderr=subprocess.PIPE)
    try:
        checkpoint, patience = where / "runs" / "run" / "checkpoint.pt", time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1:] == ["imgopt-fast train: stopped; continue with --resume runs/run"]
    assert torch.load(checkpoint, weights_only=True)["position"]["epoch"] > 0


def test_a_killed_training_goes_on_from_a_whole_checkpoint(images: Path) -> None:
    """kill -9 at whatever moment: the checkpoint loads, and the resumed training has the bits of one left alone."""
    where = images.parent
    flags = ["--epochs", "30", "-b", "32", "--prune-epochs", "0", "--quantize", "none", "--img-size", "16"]
    flags += ["--no-memory", "--no-reference-epoch", "--warmup-epochs", "1"]
    assert main(["train", "images", *flags, "--experiment", "whole"]) == 0
    command = [sys.executable, "-m", "imgopt_fast", "train", "images", *flags, "--experiment", "killed"]
    process = subprocess.Popen(command, cwd=where, stderr=subprocess.DEVNULL)
    try:
        run, patience = where / "runs" / "killed", time.monotonic() + 120
        while not (run / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(random.random() * 0.2)  # between two epochs, or in the middle of writing
    finally:
        process.kill()
        process.wait()
    assert load_checkpoint(run / "checkpoint.pt")["position"].epoch < 30
    assert main(["train", "--resume", str(run)]) == 0
    assert columns(run) == columns(where / "runs" / "whole")
    one, other = ((where / "runs" / name / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == other


def test_a_folder_that_cannot_be_written_is_one_line(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    require(Path("/proc/self").exists(), "/proc, where not even root can write")
    assert main(["train", "images", *TINY, "--output", "/proc/runs"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "/proc/runs" in err


def test_help_is_quick_and_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for word in ("--data", "--model", "--batch-size", "--no-amp", "--config", "examples:", "default: 512"):
        assert word in text
    code = (
        "import sys; from imgopt_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    with pytest.raises(SystemExit, match="2"):
        main(["fly"])


def test_the_installed_command_is_this_one() -> None:
    command = shutil.which("imgopt-fast", path=str(Path(sys.executable).parent))
    require(command is not None, "the installed command beside the interpreter")
    assert command is not None
    result = subprocess.run([command, "--version"], text=True, capture_output=True, check=True)
    assert result.stdout.startswith("imgopt-fast ")


def test_compile_is_short_for_inductor() -> None:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_options(parser)
    assert vars(parser.parse_args(["--compile"])) == {"torchcompile": "inductor"}
    assert vars(parser.parse_args([])) == {}


def test_a_model_of_the_folder_one_works_in(images: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (images.parent / "own_network.py").write_text("def small(num_classes, in_channels):\n    return 5\n")
    assert main(["train", "images", "--model", "own_network:small"]) == 2
    assert "'own_network:small' returned int, expected a torch.nn.Module" in capfd.readouterr().err
