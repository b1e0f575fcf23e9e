"""Export to ONNX: what onnxruntime and OpenVINO compute from the file, against the network tensor by tensor."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import optional
from torch import Tensor, nn

from imgopt_fast import export
from imgopt_fast.compress import Int8Config, PruneConfig, prune, quantize
from imgopt_fast.targets import describe
from imgopt_fast.targets.fresh_process import FreshProcess, openvino
from imgopt_fast.targets.onnx import write
from imgopt_fast.targets.onnx_graph import OPSET, sparse

onnx = optional("onnx")
ort = optional("onnxruntime")
optional("openvino")


class Everything(nn.Module):
    """Every int8 step that there is: uneven padding, dilation, groups, all pools, concat, add, clamps, flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, 1, 1)
        self.b = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=2)
        self.c = nn.Conv2d(8, 12, (2, 3), (2, 1))
        self.d = nn.Conv2d(12, 12, 1)
        self.e = nn.Conv2d(24, 6, 3)
        self.fc = nn.Linear(6 * 4 * 8, 20)
        self.out = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.max_pool2d(F.relu(x + self.b(x)), 3, 1, 1)
        y = self.c(F.pad(x, (1, 0, 0, 1)))
        z = F.avg_pool2d(F.hardtanh(y + self.d(y)), 2, 1)
        z = torch.cat([z, F.avg_pool2d(y, 2, 1)], 1)
        z = self.e(z.clamp(-0.5, 0.7))
        return self.out(F.relu(self.fc(z.flatten(1))))


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("form", ["qdq", "qlinear"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_step_agrees(form: str, power_of_two: bool, tmp_path: Path) -> None:
    x = images(8, 3, 14, 12)
    model = quantize(Everything().eval(), [x], Int8Config(power_of_two=power_of_two))
    kinds = {layer.kind for layer in describe(model, x[:2]).layers}
    assert kinds >= {"quantize", "conv2d", "linear", "concat", "rescale", "max_pool2d", "avg_pool2d", "flatten"}
    report = export(model, "onnx", tmp_path / "model.onnx", images=x, form=form)
    assert [check.engine.split()[0] for check in report.checks] == ["onnxruntime", "openvino"][: 1 + (form == "qdq")]
    for check in report.checks:
        tensors = [d for d in check.differences if d.quantized]
        assert len(tensors) > 10
        if form == "qlinear" and power_of_two:
            assert all(d.largest == 0 for d in check.differences), check.tensors
        elif power_of_two:  # shifts round a half up, QuantizeLinear to even
            assert all(d.largest <= 8 for d in tensors), check.tensors
        else:
            assert all(d.largest <= 1 and d.share < 0.002 for d in tensors), check.tensors


@pytest.mark.parametrize("form", ["qdq", "qlinear"])
def test_the_file_is_standard(form: str, tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    x = images(8, 3, 24, 24)
    model = quantize(inverted_bottlenecks, [x])
    report = export(model, "onnx", tmp_path / "model.onnx", images=x, labels=model(x).argmax(1), form=form)
    assert report.accuracy == 1.0
    assert min(check.accuracy or 0 for check in report.checks) == 1.0
    assert report.size == (tmp_path / "model.onnx").stat().st_size
    stored = onnx.load(tmp_path / "model.onnx")
    assert [(o.domain, o.version) for o in stored.opset_import] == [("", OPSET)]
    assert {node.domain for node in stored.graph.node} == {""}
    operators = {node.op_type for node in stored.graph.node}
    assert operators >= ({"QuantizeLinear", "DequantizeLinear", "Conv"} if form == "qdq" else {"QLinearConv"})
    scales = {t.name: t.dims for t in stored.graph.initializer if t.name.endswith("_weight_scale")}
    assert any(list(dims) == [24] for dims in scales.values())  # one per channel
    session = ort.InferenceSession(tmp_path / "model.onnx")
    for n in (1, 5):  # the batch is free
        found = session.run(None, {"images": x[:n].numpy()})[0]
        assert np.array_equal(found, model(x[:n]).numpy())


def test_pruned_weights_are_stored_small(tmp_path: Path) -> None:
    x = images(4, 3, 12, 12)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(4096, 10)
    ).eval()
    sizes = {}
    for name in ("dense", "pruned"):
        report = export(model, "onnx", tmp_path / f"{name}.onnx", images=x)
        int8 = export(quantize(model, [x]), "onnx", tmp_path / f"{name}-int8.onnx", images=x)
        sizes[name] = (report.size, int8.size)
        assert all(d.largest < 1e-5 for check in report.checks for d in check.differences)
        assert all(check.agreement == 1 for check in int8.checks)
        if name == "dense":
            prune(model, PruneConfig(sparsity=0.9, end_step=1)).step()
    assert sizes["pruned"][0] < 0.17 * sizes["dense"][0]  # a tenth of the weights, at 5 bytes instead of 4
    assert sizes["pruned"][1] < 0.30 * sizes["dense"][1]  # at 2 bytes instead of 1


@pytest.mark.parametrize("shape", [(1,), (3, 1000), (7, 5, 3, 3)])
@pytest.mark.parametrize("density", [0.0, 0.002, 0.1, 1.0])
def test_gaps_and_values_give_the_weight_back(shape: tuple[int, ...], density: float, rng: np.random.Generator) -> None:
    array = np.where(rng.random(shape) < density, rng.integers(1, 100, shape), 0).astype(np.int8)
    packed = sparse(array)
    if packed is None:
        assert density in (0.0, 1.0) or array.size < 1000
        return
    gaps, values = packed
    unpacked = np.zeros(array.size, array.dtype)
    unpacked[np.cumsum(gaps.astype(int))] = values
    assert np.array_equal(unpacked.reshape(shape), array)
    assert gaps.nbytes + values.nbytes < array.nbytes


class Gated(nn.Module):
    """Float parts between int8 ones: SiLU, a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.a(x))
        x = self.b(x)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.fc(F.hardswish(x).mean((2, 3)))


def test_float_parts_go_along(tmp_path: Path) -> None:
    x = images(6, 3, 20, 20)
    for model in (quantize(Gated().eval(), [x]), Gated().eval()):
        report = export(model, "onnx", tmp_path / "model.onnx", images=x)
        assert all(d.largest <= (1 if d.quantized else 0.02) for c in report.checks for d in c.differences)


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(self.conv(x), 1).mean((2, 3))


def test_a_layer_that_onnx_cannot_carry_is_named(tmp_path: Path) -> None:
    x = images(2, 3, 8, 8)
    model = quantize(Sorted().eval(), [x])
    target = tmp_path / "there" / "model.onnx"
    with pytest.raises(ValueError, match=r"cumsum.*onnx cannot carry it.*--format pt2"):
        export(model, "onnx", target, images=x)
    assert list(target.parent.iterdir()) == []
    target.write_text("the old one")
    with pytest.raises(ValueError, match="cumsum"):
        export(model, "onnx", target, images=x)
    assert target.read_text() == "the old one"
    assert [p.name for p in target.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4]])
def test_a_wrong_file_is_caught(rows: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that another engine does not agree with, be it in one class, is an error, and nothing is left."""
    x = images(64, 3, 14, 12)
    model = quantize(Everything().eval(), [x])

    def broken(network, path, **options):
        for layer in network.layers:
            if layer.name == "out":
                layer.weights.weight[rows] = layer.weights.weight[rows].roll(1, 1)
        write(network, path, **options)

    monkeypatch.setattr("imgopt_fast.targets.onnx.write", broken)
    with pytest.raises(ValueError, match="where rounding explains"):
        export(model, "onnx", tmp_path / "model.onnx", images=x)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_crashes_is_an_error(tmp_path: Path) -> None:
    """OpenVINO 2026.4 dies of a Q, DQ, Q between two layers that are gone; whatever it does, this process goes on."""
    helper = onnx.helper
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "scale", "zero"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "double", "zero"], ["c"]),
        helper.make_node("DequantizeLinear", ["c", "double", "zero"], ["output"]),
    ]
    info = helper.make_tensor_value_info
    constants = [("scale", np.float32(0.5)), ("double", np.float32(1)), ("zero", np.uint8(3))]
    graph = helper.make_graph(
        nodes, "net", [info("images", 1, ["n", 3, 8, 8])], [info("output", 1, ["n", 3, 8, 8])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)]), tmp_path / "net.onnx")
    engine = openvino(tmp_path / "net.onnx", [], 1)
    try:
        (found,) = engine(images(1, 3, 8, 8).numpy(), 0)
        assert found.shape == (1, 3, 8, 8)
        print("OpenVINO runs it")
    except ValueError as error:
        print(error)
    dying = FreshProcess("engine 1.0", [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    with pytest.raises(ValueError, match=r"engine 1\.0: crashed \(SIGSEGV\).*--no-verify"):
        dying(np.zeros(3))
