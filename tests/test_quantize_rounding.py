"""What repairs the error of rounding: equalized channels, corrected biases, second-order rounding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import decibels, network, quantized
from torch import nn

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize import rounding
from imgopt_fast.compress.quantize.fuse import Operation
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.rounding import round_to_grid, second_moment
from imgopt_fast.compress.quantize.simulate import Simulation


def uneven():
    """A depthwise network whose channels differ by a factor of a thousand, as batch norms leave them."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 1),
        nn.ReLU6(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU6(),
        nn.Conv2d(32, 8, 1),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval().requires_grad_(False)
    factor = torch.logspace(-3, 0, 32)
    model[0].weight *= factor.view(-1, 1, 1, 1)
    model[0].bias *= factor
    model[2].weight /= factor.view(-1, 1, 1, 1)
    return model, torch.randn(32, 3, 12, 12)


def test_equalization_and_bias_correction_help_uneven_channels():
    model, images = uneven()
    quality = {}
    for equalize_, correct in ((False, False), (True, False), (True, True)):
        config = Int8Config(equalize=equalize_, bias_correction=correct)
        quality[equalize_, correct] = decibels(model(images), quantize(model, [images], config)(images))
    assert quality[True, False] > quality[False, False] + 10
    assert quality[True, True] > quality[True, False]


def test_second_order_rounding_is_near_the_best_of_all_roundings():
    torch.manual_seed(5)
    weight, scale = torch.randn(3, 7), torch.full((3,), 0.2)
    inputs = torch.randn(50, 7) @ torch.randn(7, 7)  # correlated, or every weight could be rounded for itself

    def error(rounded):
        return (inputs @ (rounded - weight).T).square().sum(0)

    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=7)))
    grid = (torch.floor(weight / 0.2)[:, None] + corners) * 0.2
    best = torch.stack([error(grid[:, i]) for i in range(len(corners))]).min(0).values
    found = round_to_grid(weight, scale, (inputs.T @ inputs).double()[None])
    nearest = torch.round(weight / 0.2) * 0.2
    assert torch.allclose(found / 0.2, torch.round(found / 0.2), atol=1e-4)
    assert (error(found) <= error(nearest)).all()
    assert error(found).sum() < error(nearest).sum() / 2
    assert error(found).sum() < 2 * best.sum()


@pytest.mark.parametrize("kind", ["grouped", "linear"])
def test_second_moment_is_the_quadratic_form_of_the_error(kind):
    torch.manual_seed(6)
    if kind == "linear":
        attributes, inputs = {}, torch.randn(9, 5)
        weight, off = torch.randn(4, 5), torch.randn(4, 5)
        sums = F.linear(inputs, off)
    else:
        attributes = {"stride": (2, 1), "padding": ((1, 0), (2, 1)), "dilation": (1, 2), "groups": 2}
        inputs, off = torch.randn(3, 4, 9, 8), torch.randn(6, 2, 3, 2)
        weight = torch.randn_like(off)
        sums = F.conv2d(F.pad(inputs, (2, 1, 1, 0)), off, None, (2, 1), 0, (1, 2), 2)
    operation = Operation(
        "linear" if kind == "linear" else "conv2d", "x", None, None, [], weight, attributes=attributes
    )
    for centred in (False, True):
        moment = second_moment(operation, inputs, centred=centred)
        rows = off.double().view(len(moment), -1, moment.shape[1])
        if centred:
            sums = sums - sums.mean([axis for axis in range(sums.ndim) if axis != 1], keepdim=True)
        assert torch.allclose((rows @ moment * rows).sum(), sums.double().square().sum(), rtol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "second_order"])
def test_bias_correction_takes_out_the_mean_shift_of_any_rounding(rounding):
    model, images = network("inverted")
    for correct in (False, True):
        plan = make_plan(model, [images], Int8Config(rounding=rounding, bias_correction=correct))
        simulation = Simulation(plan)
        with torch.no_grad():
            expected = model(images[:32])  # that it corrects on
            shift = (simulation(images[:32]) - expected).mean(0).abs().max()
            assert (shift < 2e-3 * expected.std()) == correct
            simulation.rounded = lambda operation: False
            if not correct:
                assert torch.allclose(simulation(images[:32]), expected, atol=1e-5), "its weights are not rounded"


def test_second_order_rounding_leaves_wide_layers_alone(monkeypatch):
    """The moment of a layer with 40,000 inputs would take 13 GB."""
    monkeypatch.setattr(rounding, "MOST_INPUTS", 8)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    images = torch.randn(64, 9)
    nearest, chosen = (quantize(model, [images], Int8Config(rounding=how)) for how in ("nearest", "second_order"))
    for name, same in (("0", True), ("2", False)):
        one, other = (network.network.segment_0.get_submodule(name).weight_int8 for network in (nearest, chosen))
        assert torch.equal(one, other) == same, name


def test_second_order_rounding_reaches_the_kernels():
    model, images = network("residual")
    nearest = quantized("residual").network.segment_0.conv1.weight_int8
    network_ = quantize(model, images.split(16), Int8Config(rounding="second_order", bias_correction=False))
    chosen = network_.network.segment_0.conv1.weight_int8
    assert 0 < (chosen.int() - nearest.int()).abs().float().mean() < 1
    assert decibels(model(images), network_(images)) > 40
