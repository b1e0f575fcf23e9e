"""The command line as a new user meets it: in a process of its own, in a folder of its own."""

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
from PIL import Image

TINY = ["--epochs", "2", "--prune-epochs", "1", "-b", "32", "--warmup-epochs", "1", "--calibration", "32"]


def imgopt_fast(
    *arguments: str, cwd: Path, largest_file: int | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command; `largest_file` bytes may be written per file, which fails as a full disk does."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.run(
        [sys.executable, "-m", "imgopt_fast", *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        preexec_fn=limit,
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line on stderr that has all `words`."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for c, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "images" / colour).mkdir(parents=True)
        for i in range(40):
            Image.effect_noise((20, 16), 30 + 40 * c).save(tmp_path / "images" / colour / f"{i}.jpg")
    return tmp_path / "images"


def test_a_folder_of_images_becomes_three_networks(images: Path) -> None:
    where = images.parent
    result = imgopt_fast("train", "images", *TINY, "--img-size", "16", "--experiment", "first", cwd=where)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no terminal: no progress line
    for word in ("dense float", "pruned", "int8", "plain PyTorch loop", "runs/first"):
        assert word in result.stdout
    run = where / "runs" / "first"
    for name in ("config.yaml", "summary.csv", "model.safetensors", "curves.png", "report.md"):
        assert (run / name).stat().st_size > 0
    with Image.open(run / "curves.png") as curves:
        assert curves.size[0] > 500
    assert [path for path in run.iterdir() if path.name.startswith(".")] == []

    # The written configuration repeats the run, and a flag overrides it.
    again = imgopt_fast(
        "train", "--config", "runs/first/config.yaml", "--experiment", "again", "--no-reference-epoch", cwd=where
    )
    assert again.returncode == 0, again.stderr
    columns = [
        [line.split(",")[:6] for line in (where / "runs" / name / "summary.csv").read_text().splitlines()]
        for name in ("first", "again")
    ]
    assert columns[0] == columns[1]
    config = yaml.safe_load((where / "runs" / "again" / "config.yaml").read_text())
    assert (config["experiment"], config["reference_epoch"], config["img_size"]) == ("again", False, 16)


def test_mistakes_are_one_line_and_exit_code_2(images: Path) -> None:
    where = images.parent
    assert_one_line(imgopt_fast("train", "missing", cwd=where), "missing", "no such folder")
    assert_one_line(imgopt_fast("train", "--config", "missing.yaml", cwd=where), "missing.yaml", "No such file")
    assert_one_line(imgopt_fast("train", "images", "--lr", "-1", cwd=where), "lr: expected a positive number")
    (images / "blue" / "bad.jpg").write_text("no image")
    assert_one_line(imgopt_fast("train", "images", cwd=where), "bad.jpg", "cannot read this image")
    assert [path.name for path in where.iterdir()] == ["images"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(images: Path) -> None:
    where = images.parent
    small = imgopt_fast("train", "images", *TINY, cwd=where, largest_file=100)
    assert_one_line(small, "config.yaml", "File too large")
    assert [path.name for path in where.iterdir()] == ["images"]
    # Enough for the configuration and not for a checkpoint.
    larger = imgopt_fast("train", "images", *TINY, cwd=where, largest_file=10_000)
    assert_one_line(larger, "checkpoint.pt", "File too large")
    assert [path.name for path in where.iterdir()] == ["images"]


def test_an_existing_run_is_not_overwritten(images: Path) -> None:
    (images.parent / "runs" / "taken").mkdir(parents=True)
    result = imgopt_fast("train", "images", *TINY, "--experiment", "taken", cwd=images.parent)
    assert_one_line(result, "runs/taken", "exists already")


def test_ctrl_c_leaves_a_checkpoint(images: Path) -> None:
    where = images.parent
    command = [sys.executable, "-m", "imgopt_fast", "train", "images", "--epochs", "10000", "--experiment", "run"]
    process = subprocess.Popen(command, cwd=where, text=True, stderr=subprocess.PIPE)
    try:
        checkpoint, patience = where / "runs" / "run" / "checkpoint.pt", time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped" in errors
    assert len(errors.splitlines()) == 1
    assert "--resume runs/run" in errors
    assert torch.load(checkpoint, weights_only=True)["position"]["epoch"] > 0
    assert_one_line(imgopt_fast("train", "--resume", "runs/run", "--lr", "1", cwd=where), "goes with no other flag")


def test_help_is_quick_and_says_what_there_is(tmp_path: Path) -> None:
    result = imgopt_fast("train", "--help", cwd=tmp_path)
    assert result.returncode == 0
    for word in ("--data", "--model", "--batch-size", "--no-amp", "--config", "examples:", "default: 128"):
        assert word in result.stdout
    code = (
        "import sys; from imgopt_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path).returncode == 0
    assert imgopt_fast("fly", cwd=tmp_path).returncode == 2


def test_the_installed_command_is_this_one() -> None:
    command = shutil.which("imgopt-fast")
    if command is None:
        pytest.skip("the package is on the path but not installed")
    result = subprocess.run([command, "--version"], text=True, capture_output=True, check=True)
    assert result.stdout.startswith("imgopt-fast ")
