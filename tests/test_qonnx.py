"""QONNX, executed by qonnx bit by bit."""

from pathlib import Path

import pytest
from conftest import optional
from test_onnx import Everything, Gated, images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.targets import describe

optional("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")  # of qonnx about its own dependencies
optional("qonnx")
SHIFTS = Int8Config(power_of_two=True)


@pytest.mark.parametrize("network", ["everything", "inverted"])
def test_qonnx_executes_every_bit(network: str, tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    x = images(8, 3, 14, 12) if network == "everything" else images(8, 3, 24, 24)
    model = quantize(Everything().eval() if network == "everything" else inverted_bottlenecks, [x], SHIFTS)
    report = export(model, "qonnx", tmp_path / "net.onnx", images=x[:4], labels=model(x[:4]).argmax(1))
    assert report.checks[0].outputs == "bit-equal"
    assert report.checks[0].accuracy == 1.0
    assert "multiplications replaced by shifts" in report.notes[-1]
    layers = [layer for layer in describe(model, x[:2]).layers if layer.weights is not None]
    assert len(report.notes) == len(layers) + 1


def test_resources_are_counted(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).eval()
    report = export(quantize(model, [images(4, 2, 6, 6)], SHIFTS), "qonnx", tmp_path / "net.onnx", verify=False)
    first, second, total = report.notes
    assert "weights 54 x 8 bits" in first
    assert "48 rescalings by shifts" in first
    assert "weights 240 x 8 bits" in second
    assert "5 rescalings" in second
    assert "53 multiplications replaced by shifts" in total


def test_refusals_name_the_layer(tmp_path: Path) -> None:
    x = images(4, 3, 20, 20)
    with pytest.raises(ValueError, match=r"silu.*qonnx cannot carry it.*--format onnx"):
        export(quantize(Gated().eval(), [x], SHIFTS), "qonnx", tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"power_of_two=True"):
        export(quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), [x]), "qonnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
