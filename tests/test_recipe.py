"""The whole recipe with its report, the verbs that go on from a run, and two processes that train one network."""

import base64
import html
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import optional, require
from tiny_training import assert_same_weights, make_images, press_ctrl_c_at, results, tiny

from imgopt_fast.cli import main
from imgopt_fast.training import InterruptedTrainingError, Report, evaluate, load_network, load_weights, resume, train

RECIPE: dict[str, Any] = {"epochs": 1, "sparsity": 0.9, "prune_epochs": 1, "distill_epochs": 1, "qat_epochs": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LEAST_SECONDS", 0.01)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Report:
    images = make_images(tmp_path_factory.mktemp("recipe") / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        return train(tiny(images, "teacher", epochs=1, prune_epochs=0, quantize="none", reference_epoch=False))


@pytest.fixture(scope="module")
def whole(teacher: Report) -> Report:
    images = Path(teacher.config.data or "")
    (images / "class1" / "bad<b>.png").write_text("no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        return train(tiny(images, "whole", **RECIPE, distill=str(teacher.path), reference_epoch=False, memory=True))


def test_one_report_shows_every_stage(whole: Report) -> None:
    assert [row.stage for row in whole.epochs] == ["dense", "pruned", "distilled", "qat"]
    assert [row.stage for row in whole.stages] == ["dense", "pruned", "distilled", "int8"]
    dense, pruned, distilled, int8 = whole.stages
    assert dense.density == 1
    assert pruned.density == distilled.density < 0.25
    assert int8.density <= pruned.density + 0.02  # what is zero stays zero through the training for int8
    assert int8.file_bytes < dense.file_bytes
    if sys.platform == "linux":
        assert all(row.peak_bytes is not None and 1000 < row.peak_bytes < 1e9 for row in whole.stages)
    for stage in ("dense", "pruned", "distilled"):
        network = load_network(whole.path, stage)
        assert network.card.stage == stage
        assert evaluate.accuracy(network.module, whole.dataset.test, network.card.prepare()) in {
            row.test_top1 for row in whole.stages if row.stage == stage
        }
    assert whole.times.keys() == {"data", "dense", "pruned", "distilled", "qat"}
    for stage in ("dense", "pruned", "distilled", "qat"):
        assert set(whole.times[stage]) == {"wait", "augment", "forward", "backward", "step"}
        assert all(value > 0 for value in whole.times[stage].values())
    markdown = (whole.path / "report.md").read_text()
    for word in ("memory", "dense, distilled", "distilled", "wait", "![samples](samples.png)", "bad<b>.png"):
        assert word in markdown
    assert whole.layers is not None
    lines = str(whole.layers).splitlines()
    assert lines[0].split() == [
        "layer",
        "operation",
        "runs",
        "in",
        "time",
        "KiB",
        "live",
        "dB",
        "alone",
        "why",
        "not",
        "int8",
    ]
    shares = [float(line.split()[3].rstrip("%")) for line in lines if " int8 " in line]
    assert 50 < sum(shares) <= 100.5  # the rest are steps between the layers
    assert re.search(r"^8 +linear +int8 +[\d.]+% +[\d.]+ +[\d.]+ +(9|8)\d% zeros", str(whole.layers), re.MULTILINE)
    assert "% zeros" in str(load_network(whole.path).module.report)
    assert all(line in markdown for line in lines)


@pytest.mark.parametrize("step", [8, 14, 15, 20])
def test_resuming_in_any_stage_ends_with_the_same_bits(
    whole: Report, teacher: Report, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    images = Path(teacher.config.data or "")
    press_ctrl_c_at(monkeypatch, step)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(images, f"stopped {step}", **RECIPE, distill=str(teacher.path), reference_epoch=False))
    stopped = images.parent / "runs" / f"stopped {step}"
    resume(stopped)
    assert results(stopped) == results(whole.path)
    assert_same_weights(stopped, whole.path)


def test_tensorboard_reads_the_events(whole: Report) -> None:
    accumulators = optional("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(whole.path)).Reload()
    assert [event.step for event in events.Scalars("eval_top1")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train_loss")] == pytest.approx(
        [row.train_loss for row in whole.epochs], rel=1e-6
    )
    assert "seconds/qat/backward" in events.Tags()["scalars"]


def test_the_page_in_a_browser(whole: Report, tmp_path: Path) -> None:
    """Chromium shows every figure at its size and every cell of the table, and asks for nothing else."""
    browser = shutil.which("chromium")
    require(browser is not None, "chromium (apt-get install chromium)")
    assert browser is not None
    text = (whole.path / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert [base64.b64decode(image) for image in images] == [
        (whole.path / f"{name}.png").read_bytes() for name in ("curves", "samples", "confusion", "mistakes", "layers")
    ]
    probe = """<script>addEventListener('load', () => {
      const found = {sizes: [...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.clientWidth]),
                     cells: [...document.querySelectorAll('table')].map(t => t.rows.length),
                     wide: document.documentElement.scrollWidth, body: document.body.innerText};
      document.body.innerHTML = '<pre>'; document.body.firstChild.textContent = JSON.stringify(found); });</script>"""
    (tmp_path / "report.html").write_text(text + probe)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800"]
    shot = tmp_path / "page.png"
    result = subprocess.run(
        [*command, "--dump-dom", f"--screenshot={shot}", (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(html.unescape(result.stdout.split("<pre>")[1].split("</pre>")[0]))
    assert len(found["sizes"]) == 5
    for natural_width, natural_height, shown_width in found["sizes"]:
        assert min(natural_width, natural_height) > 200
        assert shown_width > 300
    assert found["cells"] == [1 + len(whole.stages), 1 + len(whole.epochs)]
    assert found["wide"] <= 1000
    for words in (
        "dense, distilled",
        "distilled",
        "Layers of the int8 network",
        "conv2d",
        "bad<b>.png: not an image file",
        "Where the time went",
        "wait",
    ):
        assert words in found["body"]


# ------------------------------------------------------------------------------------------------------- verbs


def test_the_verbs_go_on_from_a_run(teacher: Report, capfd: pytest.CaptureFixture[str]) -> None:
    runs, quick = teacher.path.parent, ["--no-reference-epoch", "--no-memory"]
    assert main(["prune", str(teacher.path), "--sparsity", "0.9", "--prune-epochs", "1", *quick]) == 0
    pruned = runs / "teacher-prune"
    assert "pruned" in capfd.readouterr().out
    network = load_network(pruned)
    assert network.card.stage == "pruned"
    assert evaluate.density(network.module) < 0.25
    assert load_weights(pruned / "dense.safetensors")["0.weight"].equal(
        load_weights(teacher.path / "model.safetensors")["0.weight"]
    )
    assert main(["quantize", str(pruned), "--qat-epochs", "1", *quick]) == 0
    out = capfd.readouterr().out
    assert "pruned" in out
    assert "int8" in out
    quantized = load_network(runs / "teacher-prune-quantize")
    assert quantized.card.stage == "int8"
    assert evaluate.density(quantized.module) < 0.27
    flags = ["--model", "resnet8", "--epochs", "1", "--kd-hint-weight", "1"]
    assert main(["distill", str(teacher.path), *flags, *quick]) == 0
    assert load_network(runs / "teacher-distill").card.model == "resnet8"
    flags = ["--pretrained", str(pruned), "--epochs", "0", "--distill-epochs", "1", "--experiment", "student"]
    assert main(["distill", str(teacher.path), *flags, *quick]) == 0
    assert evaluate.density(load_network(runs / "student").module) < 0.25
    capfd.readouterr()
    tables = {"int8": ("dB alone", "2d  "), "pruned": ("break-even", "3x3"), "dense": ("float32", "Conv2d")}
    for stage, words in tables.items():
        run = runs / "teacher-prune-quantize" if stage == "int8" else pruned
        assert main(["eval", str(run), "--layers", "--stage", stage]) == 0
        out = capfd.readouterr().out
        assert all(word in out for word in words), stage
    assert main(["eval", str(pruned), "--stage", "qat"]) == 2
    assert main(["quantize", str(runs / "missing")]) == 2
    assert "missing" in capfd.readouterr().err


def test_every_verb_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    from imgopt_fast.cli import VERBS

    for verb in VERBS:
        with pytest.raises(SystemExit, match="0"):
            main([verb, "--help"])
        assert f"examples:\n  imgopt-fast {verb}" in capsys.readouterr().out, verb


# ------------------------------------------------------------------------------------------------------- processes


def run_processes(world: int, *arguments: str, cwd: Path) -> list[str]:
    """Run `imgopt-fast ARGUMENTS` as torchrun would start it; what each process prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    setting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "imgopt_fast", *arguments],
            cwd=cwd,
            env={**os.environ, **setting, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in outputs]


def columns(run: Path) -> torch.Tensor:
    return torch.tensor([[float(row[i]) for i in (0, 2, 4, 5)] for row in results(run)[1:]])


def test_two_processes_train_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without batch norm, whose statistics are those of a part, the two differ in the order of sums only."""
    images = make_images(tmp_path / "images")
    ways: dict[str, Any] = {
        "model": "small_networks:no_batch_norm", "epochs": 2, "prune_epochs": 1, "quantize": "none",
        "mixup": 0.4, "cutmix": 1.0, "reference_epoch": False, "amp": False, "grad_accum_steps": 2,
    }  # fmt: skip
    alone = train(tiny(images, "alone", **ways)).path
    config = tiny(images, "together", **ways)
    config.save(tmp_path / "config.yaml")
    press_ctrl_c_at(monkeypatch, 9)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(images, "stopped", **ways))
    first, second = run_processes(2, "train", "--config", "config.yaml", cwd=tmp_path)
    assert "pruned" in first
    assert second == ""
    together = tmp_path / "runs" / "together"
    assert sorted(path.name for path in together.iterdir() if "tfevents" not in path.name) == sorted(
        path.name for path in alone.iterdir() if "tfevents" not in path.name
    )
    run_processes(2, "train", "--resume", "runs/stopped", cwd=tmp_path)  # begun by one process
    for run in (together, tmp_path / "runs" / "stopped"):
        torch.testing.assert_close(columns(run), columns(alone), rtol=1e-3, atol=1e-4)
        one, other = (load_weights(path / "dense.safetensors") for path in (alone, run))
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
