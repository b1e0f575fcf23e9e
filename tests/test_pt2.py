"""torch.export files, loaded in a fresh process, and AOTInductor packages."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import require
from test_onnx import Everything, Gated, images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import PruneConfig, prune, quantize


def test_networks_run_in_a_fresh_process(tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    x = images(6, 3, 24, 24)
    model = quantize(inverted_bottlenecks, [x])
    report = export(model, "pt2", tmp_path / "net.pt2", images=x, labels=model(x).argmax(1))
    assert report.checks[0].outputs == "bit-equal"
    assert report.checks[0].accuracy == 1.0
    program = torch.export.load(tmp_path / "net.pt2")
    names = {str(node.target) for node in program.graph.nodes}
    assert "imgopt_fast.int8_graph.default" in names
    assert torch.equal(program.module()(x[:1]), model(x[:1]))


def test_pruned_networks_keep_their_operation(tmp_path: Path) -> None:
    x = images(4, 3, 12, 12)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 5)).eval()
    prune(model, PruneConfig(sparsity=0.9, end_step=1)).step()
    model(x)  # the layouts
    export(model, "pt2", tmp_path / "net.pt2", images=x)
    names = {str(node.target) for node in torch.export.load(tmp_path / "net.pt2").graph.nodes}
    assert "imgopt_fast.masked_matmul.default" in names


def test_aotinductor_packages_run(tmp_path: Path) -> None:
    require(shutil.which("g++") is not None, "g++")
    x = images(4, 3, 14, 12)
    report = export(quantize(Everything().eval(), [x]), "pt2", tmp_path / "net.pt2", images=x, aoti=True)
    assert "AOTInductor" in report.checks[0].engine
    assert report.checks[0].outputs == "bit-equal"


def test_errors(tmp_path: Path) -> None:
    x = images(2, 3, 20, 20)
    with pytest.raises(ValueError, match=r"ends in \.pt2"):
        export(quantize(Gated().eval(), [x]), "pt2", tmp_path / "net.bin")

    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.export cannot trace Branch"):
        export(Branch(), "pt2", tmp_path / "net.pt2", images=x)
    assert list(tmp_path.iterdir()) == []
