"""What quantize and its result take: precisions, layouts, modes, wrappers, and errors that name what is wrong."""

import copy
import weakref

import pytest
import torch
from quantized_networks import decibels, network, quantized
from torch import nn
from torch.utils.data import TensorDataset

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize import profile, sensitivity


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_in_and_float32_out(dtype):
    model, images = network("islands")
    lower = copy.deepcopy(model).to(dtype)
    result = quantize(lower, [images.to(dtype)])
    assert next(lower.parameters()).dtype == dtype, "the model is not changed"
    got = result(images.to(dtype))
    assert got.dtype == torch.float32
    assert torch.equal(got, result(images.to(dtype).float()))
    assert decibels(model(images), got) > 25
    assert {layer.dtype for layer in result.report.layers} == {"int8", "float32"}
    assert profile(result, images[:2].to(dtype)).steps
    ranked = sensitivity(lower, [images.to(dtype)], score=lambda alone: float(alone(images.to(dtype)).mean()))
    assert all(layer.score is not None for layer in ranked)


def test_casting_the_result_changes_nothing():
    _, images = network("islands")
    expected = quantized("islands")(images)
    for cast in ("half", "bfloat16", "double"):
        found = getattr(copy.deepcopy(quantized("islands")), cast)()
        assert torch.equal(found(images), expected)
        assert {b.dtype for b in found.buffers() if b.is_floating_point()} == {torch.float32}


def test_layouts_give_the_same_bits():
    model, images = network("residual")
    result = quantized("residual")
    expected = result(images)
    wide = torch.randn(*images.shape[:3], 2 * images.shape[3])
    wide[..., ::2] = images
    for same in (images.to(memory_format=torch.channels_last), wide[..., ::2]):
        assert torch.equal(result(same), expected)
    laid = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other = quantize(laid, [images.to(memory_format=torch.channels_last)])
    assert decibels(model(images), other(images)) > 30


def test_trains_around_a_quantized_part():
    """An int8 body under a float head: the part stays in evaluation mode, and the head learns."""
    _, images = network("residual")
    result = quantized("residual")
    whole = nn.Sequential(result, nn.Linear(result(images[:1]).shape[1], 2)).train()
    assert whole.training
    assert not any(module.training for module in result.modules())
    assert [name for name, _ in whole.named_parameters()] == ["1.weight", "1.bias"]
    whole(images).sum().backward()
    assert whole[1].weight.grad is not None
    assert result.train(True) is result


def test_wrapped_models():
    model, images = network("residual")
    expected = quantized("residual").report.int8_layers
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        result = quantize(wrapped, [images], Int8Config(exclude=("conv1",)))
        assert set(expected) - set(result.report.int8_layers) == {"conv1"}


class Two(nn.Module):
    def forward(self, left, right, scale=1.0):
        return left + right * scale


class Named(nn.Module):
    """Written without the word `self`."""

    def forward(this, x):
        return x * 2 if x.sum() > 0 else x


def spoiled(value):
    model, _ = network("residual")
    broken = copy.deepcopy(model)
    broken.conv2.weight.data[0, 0, 0, 0] = value
    return broken


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": Two()}, ValueError, r"model: Two takes 2 inputs \(left, right\).*submodules"),
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 1), Named())}, ValueError, r"1 Named \(.*: return x \* 2 if"),
        ({"model": nn.Sequential(nn.LazyConv2d(4, 1))}, ValueError, "cannot trace(.|\n)*on a batch first"),
        ({"model": spoiled(torch.nan)}, ValueError, "model: the weight of conv2, .* is not finite"),
        ({"model": spoiled(-torch.inf)}, ValueError, "model: the weight of conv2, .* is not finite"),
        ({"calibration": None}, TypeError, "calibration: expected an iterable of batches, got NoneType"),
        (
            {"calibration": TensorDataset(torch.zeros(2, 3, 32, 30))},
            TypeError,
            "calibration: .* a dataset .*DataLoader",
        ),
        ({"config": {"exclude": ()}}, TypeError, "config: expected an Int8Config, got dict"),
    ],
)
def test_errors_name_the_cause(arguments, error, match):
    model, images = network("residual")
    with pytest.raises(error, match=match):
        quantize(**({"model": model, "calibration": [images]} | arguments))


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        (torch.zeros(2, 3, 32, 30, dtype=torch.uint8), TypeError, "images: expected a floating tensor, .*uint8"),
        ([1.0], TypeError, "images: expected a floating tensor, .*list"),
        (torch.zeros(3, 32, 30), ValueError, r"images: expected a batch of \(3, 32, 30\) each.* got \(3, 32, 30\)"),
        (torch.zeros(2, 1, 32, 30), ValueError, r"images: .* got \(2, 1, 32, 30\)"),
    ],
)
def test_errors_of_the_result_name_images(images, error, match):
    with pytest.raises(error, match=match):
        quantized("residual")(images)


def test_sensitivity_holds_one_batch():
    """Its memory does not grow with the number of images."""
    model, images = network("residual")
    alive = []

    def batches():
        for _ in range(5):
            batch = images[:4].clone()
            alive.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(seen() is not None for seen in alive) <= 3  # the first one, and at most two on their way

    assert sensitivity(model, batches())
    assert len(alive) == 5


def test_profile_takes_quantized_networks():
    model, images = network("residual")
    with pytest.raises(TypeError, match="model: expected an Int8Model"):
        profile(model, images)
