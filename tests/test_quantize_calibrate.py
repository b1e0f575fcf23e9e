"""The choice of scales: histograms and what each calibration clips, weights, biases."""

import dataclasses
import math
import weakref

import pytest
import torch
from quantized_networks import decibels, network, planned

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize.calibrate import (
    BINS,
    CANDIDATES,
    Histogram,
    choose_range,
    choose_scale,
    observe,
)
from imgopt_fast.compress.quantize.model import to_int8
from imgopt_fast.compress.quantize.weights import quantize_weight


def test_every_calibration_serves():
    model, images = network("inverted")
    plan = planned("inverted")
    histograms = observe(plan.graph, plan.scales, images.split(16), {})
    for calibration in ("minmax", "percentile", "entropy"):
        config = Int8Config(calibration=calibration)
        scales = {node: choose_scale(histogram, config) for node, histogram in histograms.items()}
        result = to_int8(dataclasses.replace(plan, scales=scales, config=config))
        assert decibels(model(images), result(images)) > 28


def test_weights_are_within_half_a_step_and_channels_are_independent():
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 1e-20]).view(5, 1, 1, 1)
    stored, scale = quantize_weight(weight, None, 0.1, Int8Config(calibration="minmax"))
    error = (stored * scale.view(-1, 1, 1, 1) - weight).abs().amax((1, 2, 3))
    assert (error <= scale / 2 * 1.001).all()
    assert stored[:3].abs().amax((1, 2, 3)).tolist() == [127, 127, 127]


def test_bias_of_a_dead_channel_fits_into_int32():
    weight, bias = torch.zeros(2, 3, 1, 1), torch.tensor([3.0, -1e4])
    stored, scale = quantize_weight(weight, bias, 1e-3, Int8Config())
    steps = bias.double() / (1e-3 * scale.double())
    assert (steps.abs() < 2**31).all()
    assert (stored == 0).all()


def histogram_of(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def test_histogram_grows_without_losing_values():
    small, large = torch.rand(64, 5) - 0.5, 37 * torch.randn(64, 5)
    grown, whole = histogram_of(small, large), histogram_of(torch.cat([small, large]))
    assert grown.counts.sum() == whole.counts.sum() == 640
    assert (grown.minimum, grown.maximum) == (float(large.min()), float(large.max()))


def squared_error(values, chosen):
    stored = (torch.round(values / chosen.scale) + chosen.zero_point).clamp(0, 255)
    return float(((stored - chosen.zero_point) * chosen.scale - values).square().mean())


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_mse_beats_minmax_on_long_tails_and_is_near_the_best(shift):
    values = torch.distributions.Laplace(shift, 1.0).sample((1000, 16))
    values = values.clamp(min=0) if shift == 0 else values
    histogram = histogram_of(values)
    mse, minmax = (choose_scale(histogram, Int8Config(calibration=name)) for name in ("mse", "minmax"))
    assert squared_error(values, mse) < squared_error(values, minmax)
    if shift == 0:
        best = min(squared_error(values, mse._replace(scale=float(end) / 255)) for end in torch.linspace(2, 20, 60))
        assert squared_error(values, mse) < 1.02 * best


def test_percentile_clips_the_stated_share():
    values = torch.rand(1000, 100)
    chosen = choose_scale(histogram_of(values), Int8Config(calibration="percentile", percentile=90.0))
    assert 255 * chosen.scale == pytest.approx(0.9, abs=0.01)
    assert chosen.zero_point == 0


def test_entropy_clips_an_outlier():
    values = torch.cat([torch.randn(20000).abs(), torch.tensor([400.0])])[:, None]
    chosen = choose_scale(histogram_of(values), Int8Config(calibration="entropy"))
    assert 255 * chosen.scale < 100


def divergence(counts, begin, end):
    """Of the talk's algorithm, bin by bin: clip into the outermost bins, merge into levels, spread over full bins."""
    kept, bins = counts[begin:end], end - begin
    clipped = list(kept)
    clipped[0] += sum(counts[:begin])
    clipped[-1] += sum(counts[end:])
    rendered = [0.0] * bins
    for level in range(255):
        members = [i for i in range(-(-level * bins // 255), -(-(level + 1) * bins // 255)) if kept[i] > 0]
        for i in members:
            rendered[i] = sum(kept[j] for j in members) / len(members)
    total, shown = sum(clipped), sum(rendered)
    return sum(
        p / total * math.log(p / total / max(q / shown, 1e-9)) for p, q in zip(clipped, rendered, strict=True) if p
    )


@pytest.mark.parametrize("two_sided", [False, True])
def test_entropy_is_the_least_divergence_of_all_ranges_that_clip_little(two_sided):
    torch.manual_seed(0)
    values = torch.distributions.Laplace(0.0, 1.0).sample((20000,)).clamp(-1.5)
    values = values if two_sided else values.abs()
    histogram = histogram_of(values[:, None])
    counts, width = histogram.counts.tolist(), 2 * histogram.range / BINS
    below, widest = -math.floor(min(float(values.min()), 0.0) / width), math.ceil(float(values.max()) / width)
    counts, middle = counts[BINS // 2 - below : BINS // 2 + widest], below
    found = {}
    for candidate in range(40):
        threshold = round(widest * (1 - candidate / CANDIDATES))
        begin, end = max(0, middle - threshold), middle + threshold
        if sum(counts[:begin]) + sum(counts[end:]) <= 0.001 * sum(counts):
            found[threshold * width] = divergence(counts, begin, end)
    low, high = choose_range(histogram, Int8Config(calibration="entropy"))
    expected = min(found, key=found.get)
    assert len(found) > 5
    assert expected < float(values.max())
    assert (low, high) == pytest.approx((max(float(values.min()), -expected) if two_sided else 0.0, expected))


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
def test_range_always_holds_zero(calibration):
    config = Int8Config(calibration=calibration)
    assert choose_scale(histogram_of(5 + torch.rand(100, 3)), config).zero_point == 0
    assert choose_scale(histogram_of(-5 - torch.rand(100, 3)), config).zero_point == 255
    assert choose_scale(histogram_of(torch.zeros(100, 3)), config).scale > 0


def test_calibration_holds_no_more_than_two_batches():
    model, _ = network("inverted")
    alive, most = weakref.WeakSet(), 0

    def batches():
        nonlocal most
        for _ in range(12):
            images = torch.randn(4, 3, 16, 16)
            alive.add(images)
            most = max(most, len(alive))
            yield images

    quantize(model, batches())
    assert most <= 3  # the first, which biases are corrected on, the last, and the one just made
