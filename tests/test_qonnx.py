"""QONNX: executed by qonnx, and through hls4ml as compiled C, bit by bit."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import require
from test_onnx import Everything, Gated, images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.targets import describe
from imgopt_fast.targets.qonnx import readable

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore")  # of qonnx and hls4ml about their own dependencies
pytest.importorskip("qonnx")
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


def test_hls4ml_computes_every_bit_in_its_c_simulation(tmp_path: Path) -> None:
    hls4ml = pytest.importorskip("hls4ml")
    require(shutil.which("g++") is not None, "g++")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Flatten()]
    torch.manual_seed(0)
    model = quantize(nn.Sequential(*layers, nn.Linear(16, 3)).eval(), [x], SHIFTS)
    network = describe(model, x)
    assert all(value.zero_point in (0, 128) for value in network.values if value.quantized)
    export(model, "qonnx", tmp_path / "net.onnx", images=x)

    wrapped = ModelWrapper(str(tmp_path / "net.onnx"))
    wrapped.set_tensor_shape("images", [1, 1, 8, 8])
    with readable():
        wrapped = cleanup_model(wrapped)
        wrapped = cleanup_model(wrapped.transform(ConvertToChannelsLastAndClean()).transform(GemmToMatMul()))
    config = hls4ml.utils.config_from_onnx_model(
        wrapped, granularity="name", backend="Vitis", default_precision="fixed<32,16>"
    )
    hls = hls4ml.converters.convert_from_onnx_model(
        wrapped, output_dir=str(tmp_path / "hls"), backend="Vitis", io_type="io_parallel", hls_config=config
    )
    with warnings.catch_warnings(action="ignore"):
        hls.compile()
    given = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(hls.predict(given).reshape(8, 3), model(x).numpy())


def test_refusals_name_the_layer(tmp_path: Path) -> None:
    x = images(4, 3, 20, 20)
    with pytest.raises(ValueError, match=r"silu.*qonnx cannot carry it.*--format onnx"):
        export(quantize(Gated().eval(), [x], SHIFTS), "qonnx", tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"power_of_two=True"):
        export(quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), [x]), "qonnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
