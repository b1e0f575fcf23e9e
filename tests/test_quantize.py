"""quantize: the traced, folded and converted network against the float one, and against integer arithmetic."""

import copy
import dataclasses
import functools
import itertools
import logging
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize import QatModel, profile, qat, sensitivity
from imgopt_fast.compress.quantize.calibrate import Histogram, Scale, choose_scale, observe
from imgopt_fast.compress.quantize.equalize import equalize
from imgopt_fast.compress.quantize.fold import fold
from imgopt_fast.compress.quantize.fuse import Operation, fuse
from imgopt_fast.compress.quantize.model import to_int8
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.rounding import round_to_grid, second_moment
from imgopt_fast.compress.quantize.simulate import Simulation, fake_quantize
from imgopt_fast.compress.quantize.trace import trace
from imgopt_fast.compress.quantize.weights import quantize_weight
from imgopt_fast.nn import MaskedConv2d, MaskedLinear


class Residual(nn.Module):
    """Residual blocks with a projection, max pool, global pool: the shape of a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 20, 3, 2, 1), nn.BatchNorm2d(20)
        self.down = nn.Sequential(nn.Conv2d(12, 20, 1, 2, bias=False), nn.BatchNorm2d(20))
        self.fc = nn.Linear(20, 7)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        x = F.relu_(y)
        x = torch.relu(self.bn3(self.conv3(x)) + self.down(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Inverted(nn.Module):
    """Inverted bottlenecks with depthwise convolutions and ReLU6: the shape of a MobileNetV2."""

    def __init__(self):
        super().__init__()

        def unit(i, o, k, stride=1, groups=1, act=True):
            layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
            return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))

        self.stem = unit(3, 8, 3, 2)
        self.block1 = nn.Sequential(unit(8, 24, 1), unit(24, 24, 3, groups=24), unit(24, 8, 1, act=False))
        self.block2 = nn.Sequential(unit(8, 24, 1), unit(24, 24, 5, 2, groups=24), unit(24, 16, 1, act=False))
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block1(x)
        return self.fc(self.drop(self.block2(x).mean([2, 3])))


class Branches(nn.Module):
    """Concats, a batch norm that no convolution precedes, an average pool: DenseNet and Inception."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, (1, 5), padding=(0, 2))
        self.norm = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 9, 3, padding="same", bias=False)
        self.fc = nn.Linear(9 * 16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.left(x)), self.right(x)], 1)
        x = F.avg_pool2d(F.relu(self.norm(x)), 2)
        return self.fc(self.last(x).clamp(-1.5, 2.5).view(x.size(0), -1))


class SamePadConv(nn.Conv2d):
    """TensorFlow's padding: computed from the image, one more below and right."""

    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride)


class Islands(nn.Module):
    """What has no int8 form between what has: SiLU, hardswish, squeeze-excite, layer norm."""

    def __init__(self):
        super().__init__()
        self.stem = SamePadConv(3, 16, 3, 2)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.conv2, self.conv3 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 1)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        assert x.shape[1] == 3
        x = F.silu(self.stem(x))
        y = F.hardswish(self.bn1(self.conv1(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + y * gate
        x = F.relu(self.conv3(F.relu(self.conv2(x)))) + x
        return self.fc(self.norm(x.mean((2, 3))))


NETWORKS = {"residual": Residual, "inverted": Inverted, "branches": Branches, "islands": Islands}


@functools.cache
def network(name):
    """A network whose batch norms are not trivial, and images for it."""
    torch.manual_seed(3)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    size = (8, 8) if name == "branches" else (32, 30)
    return model.requires_grad_(False), torch.randn(48, 3, *size)


@functools.cache
def planned(name):
    """Its plan: tracing costs seconds, so the tests share it."""
    model, images = network(name)
    return make_plan(model, images.split(16), Int8Config())


@functools.cache
def quantized(name):
    """Its int8 form; tests copy it before they change it."""
    return to_int8(planned(name))


def decibels(expected, got):
    """Signal to quantization noise of the whole output."""
    expected, got = expected.detach().double(), got.detach().double()
    return float(10 * torch.log10(expected.var() / (expected - got).square().mean()))


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


def test_every_calibration_serves():
    model, images = network("inverted")
    plan = planned("inverted")
    histograms = observe(plan.graph, plan.scales, images.split(16), {})
    for calibration in ("minmax", "percentile", "entropy"):
        config = Int8Config(calibration=calibration)
        scales = {node: choose_scale(histogram, config) for node, histogram in histograms.items()}
        result = to_int8(dataclasses.replace(plan, scales=scales, config=config))
        assert decibels(model(images), result(images)) > 28


def test_power_of_two_scales():
    model, images = network("residual")
    result = quantize(model.train(), [images], Int8Config(power_of_two=True))
    assert model.training, "the model is not changed"
    scales = [value for name, value in result.named_buffers() if name.endswith("scale")]
    assert all(torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)) for scale in scales)
    assert decibels(model.eval()(images), result(images)) > 20


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


def test_compile_and_export():
    _, images = network("islands")
    result = quantized("islands")
    expected = result(images)
    assert torch.allclose(torch.compile(result, fullgraph=True, backend="aot_eager")(images), expected)
    program = torch.export.export(result, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(images[:5]), result(images[:5]))


def test_eval_only():
    result = quantized("residual")
    result.eval()
    with pytest.raises(RuntimeError, match="does not train"):
        result.train()


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
        ({"calibration": [torch.zeros(2, 1, 8, 8)]}, ValueError, r"calibration: .* not take a batch of shape \(2, 1"),
        ({"calibration": ["image.png"]}, TypeError, "calibration: .*str"),
        ({"calibration": [torch.full((2, 3, 32, 30), torch.nan)]}, ValueError, "calibration: .* is not finite"),
        ({"config": Int8Config(exclude=("convX",))}, ValueError, "exclude: .*'convX'"),
        ({"model": Untraceable()}, ValueError, "model: torch.export cannot trace Untraceable"),
    ],
)
def test_bad_input(arguments, error, match):
    model, images = network("residual")
    with pytest.raises(error, match=match):
        quantize(**({"model": model, "calibration": [images]} | arguments))


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


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
def test_range_always_holds_zero(calibration):
    config = Int8Config(calibration=calibration)
    assert choose_scale(histogram_of(5 + torch.rand(100, 3)), config).zero_point == 0
    assert choose_scale(histogram_of(-5 - torch.rand(100, 3)), config).zero_point == 255
    assert choose_scale(histogram_of(torch.zeros(100, 3)), config).scale > 0


def test_slow_backend_is_logged_once(monkeypatch, caplog):
    from imgopt_fast.compress.quantize import report

    monkeypatch.setattr(report._native, "backend", lambda: "reference")
    monkeypatch.setattr(report, "_logged", set())
    with caplog.at_level(logging.WARNING, "imgopt_fast"):
        for _ in range(2):
            report.log_once(report.speed_note())
    assert len(caplog.records) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_do_what_the_simulation_does(name):
    """An oracle that shares no arithmetic with the kernels: float convolutions of rounded values."""
    _, images = network(name)
    with torch.no_grad():
        simulated = Simulation(planned(name))(images)
    # A value on a rounding boundary may fall to the other side, because float sums are not exact.
    assert decibels(quantized(name)(images), simulated) > 60


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


def test_qat_trains_and_converts_without_changing_a_bit():
    model, images = network("inverted")
    images = images[:16]
    target = torch.randint(5, (len(images),))
    trained = qat(model, [images]).train()
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(trained(images), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    trained.eval()
    result = trained(images)
    assert torch.equal(result, trained.convert()(images))
    assert torch.equal(result, copy.deepcopy(trained)(images))
    with torch.no_grad():
        assert decibels(trained.train()(images), result) > 40


def test_qat_state_restores_the_network():
    _, images = network("residual")
    trained, other = QatModel(planned("residual")).eval(), QatModel(planned("residual")).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    assert not torch.equal(trained(images), other(images))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(trained(images), other(images))


def test_qat_gradient_is_straight_through_and_stops_at_saturation():
    values = torch.tensor([-3.0, 0.26, 0.99, 30.0], requires_grad=True)
    rounded = fake_quantize(values, Scale(0.1, 10))
    assert rounded.tolist() == pytest.approx([-1.0, 0.3, 1.0, 24.5])
    rounded.sum().backward()
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


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
    moment = second_moment(operation, inputs)
    rows = off.double().view(len(moment), -1, moment.shape[1])
    assert torch.allclose((rows @ moment * rows).sum(), sums.double().square().sum(), rtol=1e-5)


def test_second_order_rounding_reaches_the_kernels():
    model, images = network("residual")
    nearest = quantized("residual").network.segment_0.conv1.weight_int8
    network_ = quantize(model, images.split(16), Int8Config(rounding="second_order", bias_correction=False))
    chosen = network_.network.segment_0.conv1.weight_int8
    assert 0 < (chosen.int() - nearest.int()).abs().float().mean() < 1
    assert decibels(model(images), network_(images)) > 40


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
