"""quantize: the traced, folded and converted network against the float one, its state, and what it refuses."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import NETWORKS, decibels, network, quantized
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize.equalize import equalize
from imgopt_fast.compress.quantize.fold import fold
from imgopt_fast.compress.quantize.fuse import fuse
from imgopt_fast.compress.quantize.trace import trace
from imgopt_fast.nn import MaskedConv2d, MaskedLinear


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_folding_and_equalizing_keep_the_output(name):
    model, images = network(name)
    expected = model(images)
    graph, _ = trace(model, images)
    assert torch.allclose(graph(images), expected, atol=1e-5)
    fold(graph)
    assert torch.allclose(graph(images), expected, atol=1e-5)
    assert not any("batch_norm" in str(node.target) for node in graph.graph.nodes)
    fusion = fuse(graph)
    before = [operation.weight for operation in fusion.operations.values()]
    equalize(graph, fusion, images)
    assert torch.allclose(graph(images), expected, atol=1e-5)
    assert any(old is not new.weight for old, new in zip(before, fusion.operations.values(), strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_int8_is_close_to_float(name):
    model, images = network(name)
    got = quantized(name)(images)
    assert got.dtype == torch.float32
    assert decibels(model(images), got) > 30


def test_power_of_two_scales():
    model, images = network("residual")
    result = quantize(model.train(), [images], Int8Config(power_of_two=True))
    assert model.training, "the model is not changed"
    scales = [value for name, value in result.named_buffers() if name.endswith("scale")]
    assert all(torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)) for scale in scales)
    assert decibels(model.eval()(images), result(images)) > 20


def test_padding_computed_from_the_image_is_absorbed_and_binds_the_size():
    result = quantized("islands")
    assert result.image_size == (32, 30)
    assert result.network.segment_0.stem.padding == ((0, 1), (0, 1))
    with pytest.raises(ValueError, match="images: expected size"):
        result(torch.zeros(1, 3, 30, 32))


def test_any_batch_and_size_where_the_model_has_none_of_its_own():
    model, _ = network("residual")
    for shape in ((1, 3, 32, 30), (3, 3, 17, 45), (0, 3, 32, 30)):
        images = torch.randn(shape)
        got = quantized("residual")(images)
        assert got.shape == model(images).shape
    images = torch.randn(8, 3, 40, 24)
    assert decibels(model(images), quantized("residual")(images)) > 30


def test_masked_layers_quantize_like_dense_ones():
    torch.manual_seed(1)
    conv, linear = MaskedConv2d(3, 8, 3, padding=1), MaskedLinear(8, 4)
    masked = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear).eval()
    for layer in (conv, linear):
        layer.set_mask(torch.rand(layer.weight.shape) < 0.5)
        layer.weight.data[~layer.weight_mask] = 9.0  # must not be seen
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *masked[1:4], nn.Linear(8, 4)).eval()
    for twin, layer in ((dense[0], conv), (dense[4], linear)):
        twin.weight.data = torch.where(layer.weight_mask, layer.weight, 0).detach()
        twin.bias.data = layer.bias.detach()
    images = torch.randn(8, 3, 9, 9)
    assert torch.equal(quantize(masked, [images])(images), quantize(dense, [images])(images))


class Awkward(nn.Module):
    """Layers for models that are written in ways a tracer may stumble over; `forward` is one of the functions below."""

    def __init__(self, forward):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.conv3, self.norm, self.fc = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(8), nn.Linear(16, 5)
        self.attend = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def preactivation(m, x):
    x = m.conv1(x)
    x = x + m.conv2(F.relu(m.norm(x)))
    return m.conv3(F.relu(m.norm(x)))


def shared_layer_and_dict(m, x):
    x = F.relu(m.conv2(F.relu(m.conv2(F.relu(m.conv1(x))))))
    return {"logits": m.fc(m.conv3(x).mean((2, 3)))}


def channel_shuffle(m, x):
    b, _, h, w = x.shape
    x = F.relu(m.conv1(x)).view(b, 2, 4, h, w).transpose(1, 2).reshape(b, 8, h, w)
    left, right = x.chunk(2, 1)
    return m.conv3(m.conv2(torch.cat([right, left], 1)))


def write_into_view(m, x):
    x = m.conv1(x)
    x[:, :4].relu_()
    return m.conv3(m.conv2(x))


def attention(m, x):
    tokens = m.conv3(F.relu(m.conv1(x))).flatten(2).transpose(1, 2)
    return m.fc(m.attend(tokens)[:, 0])


def value_read_twice(m, x):
    a = m.conv2(F.relu(m.conv1(x)))
    b = F.relu(a + m.conv2(a))
    return m.conv3(F.relu(b + a))


@pytest.mark.parametrize(
    "forward",
    [preactivation, shared_layer_and_dict, channel_shuffle, write_into_view, attention, value_read_twice],
)
def test_awkward_models(forward):
    model = Awkward(forward).eval().requires_grad_(False)
    images = torch.randn(16, 3, 8, 8)
    expected = model(images)
    result = quantize(model, [images])
    got = pickle.loads(pickle.dumps(result))(images)
    if isinstance(expected, dict):
        expected, got = expected["logits"], got["logits"]
    assert decibels(expected, got) > 30
    assert result.report.int8_layers


def test_layers_of_torch_prune_and_parametrizations():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    nn.utils.parametrizations.weight_norm(model[2])
    images = torch.randn(16, 3, 8, 8)
    result = quantize(model, [images])
    assert decibels(model(images), result(images)) > 30
    assert result.report.int8_layers == ["0", "2", "4"]


@pytest.mark.parametrize("name", ["residual", "islands"])
def test_survives_deepcopy_pickle_and_safetensors(name, tmp_path):
    _, images = network(name)
    result = quantized(name)
    expected = result(images)
    assert torch.equal(copy.deepcopy(result)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(result))(images), expected)

    save_file(result.state_dict(), tmp_path / "int8.safetensors")
    other = copy.deepcopy(result)
    for buffer in other.buffers():
        buffer.copy_(torch.ones_like(buffer))
    other.load_state_dict(load_file(tmp_path / "int8.safetensors"))
    assert torch.equal(other(images), expected)


def test_state_is_plain_tensors():
    state = quantized("residual").state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    weights = {name: value for name, value in state.items() if name.endswith("weight_int8")}
    assert len(weights) == 6
    assert all(value.dtype == torch.int8 for value in weights.values())
    assert not any("packed" in name for name in state)


@pytest.mark.parametrize("name", ["conv1.input_scale", "conv1.weight_scale", "global_avg_pool2d_scale"])
def test_loading_names_the_layer_whose_numbers_are_bad(name):
    result = copy.deepcopy(quantized("residual"))
    state = result.state_dict()
    found = next(key for key in state if key.endswith(name))
    state[found] = state[found] * -1
    with pytest.raises(ValueError, match=rf"{name.rpartition('.')[0] or 'global_avg_pool2d'}.*: .*scale: expected"):
        result.load_state_dict(state)


def test_compile_and_export():
    _, images = network("islands")
    result = quantized("islands")
    expected = result(images)
    assert torch.allclose(torch.compile(result, fullgraph=True, backend="aot_eager")(images), expected)
    program = torch.export.export(result, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(images[:5]), result(images[:5]))


def test_exclude_keeps_modules_float():
    model, images = network("residual")
    report = quantize(model, [images], Int8Config(exclude=("conv1", "down"))).report
    assert report.float_layers["conv1"] == "excluded"
    assert report.float_layers["down.0"] == "excluded"
    assert "conv2" in report.int8_layers


class Untraceable(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"calibration": []}, ValueError, "calibration: expected at least one batch"),
        ({"calibration": [torch.zeros(0, 3, 32, 30)]}, ValueError, "at least one batch"),
        ({"calibration": [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]}, TypeError, "calibration: .*uint8"),
        ({"calibration": torch.zeros(2, 3, 8, 8)}, TypeError, r"calibration: expected batches, got one tensor"),
        ({"calibration": [torch.zeros(2, 1, 8, 8)]}, ValueError, r"calibration: .* not take images of shape \(1, 8"),
        ({"calibration": ["image.png"]}, TypeError, "calibration: .*str"),
        (
            {"calibration": [torch.randn(4, 3, 32, 30), torch.zeros(2, 1, 32, 30)]},
            ValueError,
            r"batch.*\(2, 1, .*4 images",
        ),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module"),
        ({"calibration": [torch.full((2, 3, 32, 30), torch.nan)]}, ValueError, "calibration: .* is not finite"),
        ({"config": Int8Config(exclude=("convX",))}, ValueError, "exclude: .*'convX'"),
        ({"model": Untraceable()}, ValueError, "model: torch.export cannot trace Untraceable"),
        (
            {"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), Untraceable()))},
            ValueError,
            r"cannot trace 1.1 Untraceable \(.*: return x \* 2 if x.sum\(\) > 0 else x\)(.|\n)*torch.where",
        ),
    ],
)
def test_bad_input(arguments, error, match, capfd, caplog):
    model, images = network("residual")
    with pytest.raises(error, match=match):
        quantize(**({"model": model, "calibration": [images]} | arguments))
    assert capfd.readouterr() == ("", ""), "the error says it"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"calibration": "average"}, ValueError),
        ({"percentile": 30.0}, ValueError),
        ({"exclude": "conv1"}, TypeError),
        ({"power_of_two": 1}, TypeError),
    ],
)
def test_bad_config(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        Int8Config(**arguments)
