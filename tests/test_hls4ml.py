"""targets.hls4ml: the C simulation of a small network against the integer kernels, bit for bit."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import optional
from torch import nn

import imgopt_fast
from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.targets import hls4ml

optional("qonnx")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    optional("hls4ml")


def network() -> nn.Module:
    """Channels whose weights differ by two orders of magnitude, so that their scales do as well."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 4 * 4, 5)).eval().requires_grad_(False)
    model[0].weight *= torch.tensor([1, 0.2, 0.03, 3]).view(4, 1, 1, 1)
    model[3].weight *= torch.tensor([1, 0.1, 2, 0.02, 1, 1]).view(6, 1, 1, 1)
    return model


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of hls4ml, qonnx and what they import
def test_the_simulation_gives_the_bits_of_the_network(tmp_path: Path) -> None:
    images = torch.randn(64, 2, 8, 8).relu()
    int8 = quantize(network(), [images], Int8Config(power_of_two=True))
    imgopt_fast.export(int8, "qonnx", tmp_path / "net.onnx", verify=False)
    project = hls4ml.convert(tmp_path / "net.onnx", tmp_path / "project", (2, 8, 8))
    project.compile()
    found = project.predict(np.ascontiguousarray(images.numpy()))
    np.testing.assert_array_equal(found, int8(images).numpy())
    assert len(np.unique(found)) > 200
