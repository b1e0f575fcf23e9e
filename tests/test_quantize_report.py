"""What quantize says of a network: which layers stay float, what each one costs in time, memory and accuracy."""

import logging

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import decibels, network, quantized
from torch import nn

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize import profile, sensitivity
from imgopt_fast.compress.quantize import report as report_module
from imgopt_fast.nn import Int8Conv2d


@pytest.mark.parametrize(
    ("name", "float_parts"),
    [
        ("residual", set()),
        ("inverted", set()),
        ("branches", set()),
        (
            "islands",
            {"silu", "hardswish", "sigmoid", "relu", "mul.Tensor", "layer_norm", "mean.dim", "add.Tensor", "conv2d"},
        ),
    ],
)
def test_report_names_what_stays_float(name, float_parts):
    report = quantized(name).report
    stayed = [layer for layer in report.layers if layer.dtype == "float32"]
    assert {layer.operation for layer in stayed} == float_parts
    assert all(layer.reason for layer in stayed)
    assert {layer.name for layer in stayed if layer.operation == "conv2d"} <= {"squeeze", "excite"}
    assert report.segments == (4 if name == "islands" else 1)
    assert all(layer.name in str(report) for layer in report.layers)


class Parts(nn.Module):
    """A layer that is int8 already, and an operation of several results."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.own = Int8Conv2d(torch.ones(4, 4, 1, 1, dtype=torch.int8), torch.ones(4), input_scale=1.0)

    def forward(self, x):
        pooled, _ = F.adaptive_max_pool2d(self.conv(x), 2, return_indices=True)
        return self.own(pooled.clamp(0, 255).to(torch.uint8))


def test_report_names_what_gives_several_tensors_and_what_was_int8_before():
    report = quantize(Parts().eval(), [torch.randn(4, 3, 6, 6)]).report
    kinds = {layer.name: (layer.operation, layer.dtype) for layer in report.layers}
    assert kinds["adaptive_max_pool2d"] == ("adaptive_max_pool2d", "float32")
    assert kinds["own"] == ("int8_conv2d", "int8")
    assert report.int8_layers == ["conv", "own"]


def test_network_without_int8_says_so(caplog, monkeypatch):
    monkeypatch.setattr(report_module, "_logged", set())
    report = quantize(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()).eval(), [torch.randn(4, 3, 9)]).report
    assert "note: no layer runs in int8" in str(report)
    assert "no layer runs in int8" in caplog.text


def test_slow_backend_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(report_module._native, "backend", lambda: "reference")
    monkeypatch.setattr(report_module, "_logged", set())
    with caplog.at_level(logging.WARNING, "imgopt_fast"):
        for _ in range(2):
            report_module.log_once(report_module.speed_note())
    assert len(caplog.records) == 1


def test_sensitivity_is_the_error_of_one_layer_alone():
    model, images = network("residual")
    ranked = sensitivity(model, [images], Int8Config(calibration="minmax", equalize=False, bias_correction=False))
    assert {layer.name for layer in ranked} == {"stem", "conv1", "conv2", "conv3", "down.0", "fc"}
    assert ranked == sorted(ranked, key=lambda layer: layer.decibels)

    seen = []
    hook = model.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    exact = model(images)
    hook.remove()
    step, scale = seen[0].max() / 255, model.fc.weight.abs().amax(1, keepdim=True) / 127
    alone = F.linear(torch.round(seen[0] / step) * step, torch.round(model.fc.weight / scale) * scale, model.fc.bias)
    fc = next(layer for layer in ranked if layer.name == "fc")
    assert fc.decibels == pytest.approx(decibels(exact, alone), abs=0.1)


@pytest.mark.parametrize("name", ["residual", "islands"])
def test_profile_covers_the_network(name):
    _, images = network(name)
    found = profile(quantized(name), images[:2])
    assert sum(step.share for step in found.steps) == pytest.approx(1)
    names = {step.name for step in found.steps}
    assert {layer.name.replace(".", "_") for layer in quantized(name).report.layers if layer.dtype == "int8"} <= names
    assert all(step.seconds > 0 and step.live_bytes > 0 for step in found.steps)
    assert "silu" in str(found) or name == "residual"


def test_stepwise_is_the_whole_segment():
    _, images = network("residual")
    segment = quantized("residual").network.segment_0
    made, held = [], []

    def run(step, compute, bytes_held):
        made.append(compute())
        held.append(bytes_held)
        return made[-1]

    segment.run_stepwise([images], run)
    assert torch.equal(made[-1], segment(images)[0])
    # The second block's convolution runs while its own input alone is held, the residual's two while both are.
    sizes = [tensor.nbytes for tensor in made]
    names = [step.name for step in segment.steps]
    assert held[names.index("stem")] == sizes[0]
    pool, conv2 = (next(i for i, name in enumerate(names) if text in name) for text in ("pool", "conv2"))
    assert held[conv2] == sizes[pool] + sizes[conv2 - 1]


@pytest.mark.parametrize("part", [Parts(), nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU()), nn.Hardswish())])
def test_every_row_has_its_share_of_the_time(part):
    images = torch.randn(4, 3, 6, 6)
    result = quantize(nn.Sequential(part).eval(), [images])
    report = result.report.measured(profile(result, images))
    assert {layer.dtype for layer in report.layers} == {"int8", "float32"}
    assert all(layer.share > 0 and layer.live_bytes > 0 for layer in report.layers)
    assert sum(layer.share for layer in report.layers) <= 1 + 1e-6


def test_report_takes_the_measurements():
    model, images = network("residual")
    seen = []

    def score(alone):
        seen.append(alone(images[:2]))
        return float(len(seen) % 3)

    ranked = sensitivity(model, [images[:16]], score=score)
    assert [layer.score for layer in ranked] == [0, 0, 1, 1, 2, 2]
    assert all(not torch.equal(output, seen[0]) for output in seen[1:])
    found = profile(quantized("residual"), images[:2])
    report = quantized("residual").report.measured(found, ranked)
    rows = {layer.name: layer for layer in report.layers}
    assert rows["conv1"].share == next(step.share for step in found.steps if step.name == "conv1")
    assert rows["down.0"].decibels == next(layer.decibels for layer in ranked if layer.name == "down.0")
    assert found.peak_bytes == max(step.live_bytes for step in found.steps) > images[:2].nbytes
    assert "KiB live" in str(report)
    assert "KiB live" not in str(quantized("residual").report)
