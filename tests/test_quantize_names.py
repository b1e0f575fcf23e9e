"""Layers named as a segment names its own things, or nearly alike: each keeps its weights and its row in the report."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import decibels, network, quantized
from torch import nn

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize import profile, qat


class Chain(nn.Module):
    """Convolutions under the given names, one behind the other."""

    def __init__(self, names, used):
        super().__init__()
        self.used = used
        for i, name in enumerate(names):
            *folders, leaf = name.split(".")
            place = self
            for folder in folders:
                if not hasattr(place, folder):
                    place.add_module(folder, nn.Module())
                place = place.get_submodule(folder)
            place.add_module(leaf, nn.Conv2d(3 if i == 0 else 8, 8, 3))

    def forward(self, x):
        for name in self.used:
            x = F.relu(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize(
    ("names", "used", "rows"),
    [
        (["steps", "outputs", "zeros", "rebuild", "values", "requantize"], None, None),
        (["stem", "a.b", "a_b"], None, ["stem", "a.b", "a_b_2"]),
        (["stem", "c", "c_2"], ["stem", "c", "c", "c_2"], ["stem", "c", "c_3", "c_2"]),
        (["values", "values_"], None, ["values", "values__2"]),
    ],
)
def test_every_layer_keeps_its_weights(names, used, rows):
    torch.manual_seed(2)
    model = Chain(names, used or names).eval()
    images = torch.randn(8, 3, 16, 16)
    result = quantize(model, [images])
    assert result.report.int8_layers == (rows or names)
    assert decibels(model(images), result(images)) > 30
    student = qat(model, [images], Int8Config(bias_correction=False)).eval()
    assert decibels(model(images), student(images)) > 25
    measured = result.report.measured(profile(result, images))
    assert all(layer.share for layer in measured.layers)


class Padded(nn.Module):
    """Float operations beside a convolution in one module, of which one gives two tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.act, self.pool = nn.SiLU(), nn.AdaptiveMaxPool2d(4, return_indices=True)
        self.last = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.last(self.pool(self.act(self.conv(x)))[0])


def test_every_row_has_its_own_share():
    images = torch.randn(4, 3, 12, 12)
    result = quantize(Padded().eval(), [images])
    for same in (result, pickle.loads(pickle.dumps(result))):
        rows = {layer.name: layer for layer in same.report.measured(profile(same, images)).layers}
        assert {name: layer.dtype for name, layer in rows.items()} == {
            "conv_2": "float32", "conv": "int8", "act": "float32", "pool": "float32",
            "last": "int8", "last_2": "float32",
        }  # fmt: skip
        assert all(layer.share for layer in rows.values())
        assert len({layer.share for layer in rows.values()}) > 1


def test_every_float_row_of_a_network_is_measured():
    _, images = network("islands")
    measured = quantized("islands").report.measured(profile(quantized("islands"), images[:2]))
    names = [layer.name for layer in measured.layers]
    assert len(names) == len(set(names))
    assert all(layer.share for layer in measured.layers)
