"""Int8Conv2d, Int8Linear and Int8Segment against integer arithmetic written out."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from imgopt_fast import int8_conv2d
from imgopt_fast.nn import Int8Conv2d, Int8Linear, Int8Segment, Step


def conv_layer(**changes):
    arguments = {
        "weight_int8": torch.randint(-127, 128, (6, 2, 3, 5), dtype=torch.int8),
        "weight_scale": 0.01 + 0.02 * torch.rand(6),
        "bias": torch.randn(6),
        "input_scale": 0.05,
        "input_zero_point": 7,
        "output_scale": 0.3,
        "output_zero_point": 11,
        "stride": (2, 1),
        "padding": ((1, 0), (2, 3)),
        "dilation": (1, 2),
        "groups": 2,
        "output_min": -2.5,
        "output_max": 20.0,
    }
    return Int8Conv2d(**(arguments | changes))


def integer_layer(x, layer, weight, convolve):
    """The arithmetic of the contract, sums in float64, where they are exact."""
    sums = convolve((x.double() - int(layer.input_zero_point)), weight.double())
    step = layer.input_scale.double() * layer.weight_scale.double()
    shape = [1, -1] + [1] * (sums.ndim - 2)
    sums = sums + torch.round(layer.bias.double() / step).view(shape)
    factor = (step / (1 if layer.output_scale is None else layer.output_scale.double())).float()
    y = sums.float() * factor.view(shape)
    if layer.output_scale is None:
        return y.clamp(layer.output_min, layer.output_max)
    low, high = (
        torch.tensor(bound / layer.output_scale.item()).float() for bound in (layer.output_min, layer.output_max)
    )
    zero_point = int(layer.output_zero_point)
    y = torch.round(y.clamp(max(float(low), -zero_point), min(float(high), 255 - zero_point)))
    return (y + zero_point).to(torch.uint8)


@pytest.mark.parametrize("output_scale", [0.3, None])
def test_conv2d_is_the_integer_convolution(output_scale):
    layer = conv_layer(output_scale=output_scale, output_zero_point=0 if output_scale is None else 11)
    x = torch.randint(0, 256, (3, 4, 9, 12), dtype=torch.uint8)

    def convolve(x, weight):
        return F.conv2d(F.pad(x, (2, 3, 1, 0)), weight, None, (2, 1), 0, (1, 2), 2)

    expected = integer_layer(x, layer, layer.weight_int8, convolve)
    assert torch.equal(layer(x), expected)


def test_linear_is_the_integer_product():
    weight = torch.randint(-127, 128, (5, 12), dtype=torch.int8)
    layer = Int8Linear(
        weight,
        torch.rand(5) + 0.1,
        torch.randn(5),
        input_scale=0.02,
        input_zero_point=3,
        output_scale=0.9,
        output_zero_point=100,
        output_min=-50.0,
        output_max=70.0,
    )
    x = torch.randint(0, 256, (4, 12), dtype=torch.uint8)
    expected = integer_layer(x, layer, weight, lambda x, w: x @ w.T)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.reshape(2, 2, 12)), expected.reshape(2, 2, 5))


def test_state_is_canonical_and_loads_into_another_layer(tmp_path):
    layer, other = conv_layer(), conv_layer()
    assert set(layer.state_dict()) == {
        "weight_int8", "weight_scale", "bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point",
    }  # fmt: skip
    x = torch.randint(0, 256, (2, 4, 8, 11), dtype=torch.uint8)
    assert not torch.equal(layer(x), other(x))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(layer(x), other(x))


def test_copies_and_pickles():
    layer = conv_layer()
    x = torch.randint(0, 256, (2, 4, 8, 11), dtype=torch.uint8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).to("cpu")):
        assert torch.equal(layer(x), twin(x))
        twin.load_state_dict(conv_layer().state_dict())
        assert not torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_scales_and_biases_as_they_are(dtype):
    layer, x = conv_layer(), torch.randint(0, 256, (1, 4, 9, 12), dtype=torch.uint8)
    cast = copy.deepcopy(layer).to(dtype)
    assert all(value.equal(layer.state_dict()[name]) for name, value in cast.state_dict().items())
    assert torch.equal(cast(x), layer(x))


def test_repack_after_writing_by_hand():
    layer = conv_layer()
    x = torch.randint(0, 256, (2, 4, 8, 11), dtype=torch.uint8)
    layer.weight_int8.zero_()
    layer.repack()
    assert (layer(x).amax((0, 2, 3)) == layer(x).amin((0, 2, 3))).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_scale": 0.0}, "input_scale"),
        ({"input_zero_point": 300}, "input_zero_point"),
        ({"weight_scale": torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])}, "weight_scale: .* channel 3"),
        ({"bias": torch.tensor([0.0, 1e30, 0, 0, 0, 0])}, "bias: .* channel 1"),
        ({"weight_int8": torch.full((6, 8000, 3, 5), 127, dtype=torch.int8)}, "weight: .* channel 0"),
    ],
)
def test_bad_values(change, match):
    with pytest.raises(ValueError, match=match):
        conv_layer(**change)


def segment_of_two():
    """A residual convolution and a clamp, from a float and a stored input."""
    first = conv_layer(stride=1, padding=(1, 4), output_min=None, output_max=None)
    square = {"groups": 1, "dilation": 1, "stride": 1, "input_scale": 0.3, "input_zero_point": 11}
    weight = torch.randint(-9, 10, (4, 6, 1, 1), dtype=torch.int8)
    second = conv_layer(
        weight_int8=weight, weight_scale=torch.full((4,), 0.01), bias=None, padding=0, output_min=0.0, output_max=None,
        output_zero_point=0, **square,
    )  # fmt: skip
    steps = [
        Step("quantize", "image", (), None, {"channels": 4, "rank": 4}),
        Step("input", "stored", (), None, {"channels": 4, "rank": 4}),
        Step("conv2d", "first", (0,), None, {}),
        Step("conv2d", "second", (2,), 1, {}),
        Step("dequantize", "real", (3,), None, {}),
    ]
    scales = {"image": (0.05, 7), "stored": (0.2, 128)}
    return Int8Segment(steps, [3, 4], {"first": first, "second": second}, scales)


def test_segment_is_its_steps_one_by_one():
    segment = segment_of_two()
    x = torch.randn(2, 4, 6, 7)
    stored = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    codes = (torch.round((x * (1 / segment.image_scale)).clamp(-7, 248)) + 7).to(torch.uint8)
    hidden = segment.first(codes)
    second = segment.second
    expected = int8_conv2d(
        hidden,
        second.weight_int8,
        None,
        input_scale=second.input_scale.item(),
        input_zero_point=11,
        weight_scale=second.weight_scale,
        output_scale=second.output_scale.item(),
        output_min=0.0,
        residual=stored,
        residual_scale=segment.stored_scale.item(),
        residual_zero_point=128,
    )
    got, real = segment(x, stored)
    assert torch.equal(got, expected)
    assert torch.equal(real, expected.float() * second.output_scale)


def test_segment_follows_its_state():
    segment, other = segment_of_two(), segment_of_two()
    x = torch.randn(2, 4, 6, 7)
    stored = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    expected = segment(x, stored)[0]
    assert not torch.equal(other(x, stored)[0], expected)
    other.load_state_dict(segment.state_dict())
    for twin in (other, copy.deepcopy(segment), pickle.loads(pickle.dumps(segment))):
        assert torch.equal(twin(x, stored)[0], expected)
    with pytest.raises(ValueError, match=r"image \(quantize\): .*scale"):
        other.load_state_dict(segment.state_dict() | {"image_scale": torch.tensor(-1.0)})
