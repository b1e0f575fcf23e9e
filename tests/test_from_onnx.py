"""Quantized ONNX models on int8_graph: onnx's own node tests, our exports, and what onnxruntime's quantizer makes."""

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import optional
from test_onnx import Everything, images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import Int8Config, PruneConfig, from_onnx, prune, quantize
from imgopt_fast.targets import describe
from imgopt_fast.targets.onnx import write

onnx = optional("onnx")
ort = optional("onnxruntime")


def node_tests() -> list:
    """The cases of the onnx package for the four operators."""
    from onnx.backend.test.case import node as cases

    with warnings.catch_warnings(action="ignore"):  # other operators' cases warn while they are collected
        found = cases.collect_testcases(None)
    operators = {"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger"}
    return [case for case in found if case.model.graph.node[0].op_type in operators]


CASES = {case.name: case for case in node_tests()}


def test_all_node_tests_are_there() -> None:
    assert len(CASES) >= 12
    assert sum("qlinearmatmul" in name for name in CASES) == 8


@pytest.mark.parametrize("name", CASES)
def test_node(name: str) -> None:
    """The case's inputs but for the first become initializers: weights and scales are constants in networks."""
    case = CASES[name]
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    inputs, outputs = case.data_sets[0]
    names = [i.name for i in model.graph.input]
    for value, given in zip(names[1:], inputs[1:], strict=True):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(given), value))
    del model.graph.input[1:]
    network = from_onnx(model)
    found = network(torch.from_numpy(np.asarray(inputs[0])))
    assert np.array_equal(found.numpy(), outputs[0])
    assert found.numpy().dtype == outputs[0].dtype


@pytest.mark.parametrize("form", ["qdq", "qlinear", "shifts"])
@pytest.mark.parametrize("network", ["everything", "inverted"])
def test_our_own_exports_come_back(network: str, form: str, tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    """Residual sums, averages and concatenations too, which the integer form writes in float32 operations."""
    x = images(8, 3, 14, 12) if network == "everything" else images(8, 3, 24, 24)
    float_model = Everything().eval() if network == "everything" else inverted_bottlenecks
    model = quantize(float_model, [x], Int8Config(power_of_two=form == "shifts"))
    described = describe(model, x)
    write(described, tmp_path / "model.onnx", form="qdq" if form == "qdq" else "qlinear")
    imported = from_onnx(tmp_path / "model.onnx")
    assert torch.equal(imported(x), model(x))
    for n in (1, 3):  # the batch is free
        assert torch.equal(imported(x[:n]), model(x[:n]))
    for twin in (copy.deepcopy(imported), pickle.loads(pickle.dumps(imported))):
        assert torch.equal(twin(x), model(x))


def test_pruned_integer_networks_come_back(tmp_path: Path) -> None:
    """Their weights are stored as gaps and values."""
    x = images(8, 3, 24, 24)
    layers = [nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(64, 4, 1)]
    float_model = nn.Sequential(*layers).eval()
    prune(float_model, PruneConfig(sparsity=0.9, end_step=1)).step()
    model = quantize(float_model, [x])
    write(describe(model, x), tmp_path / "model.onnx", form="qlinear")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert operators >= {"QLinearConv", "CumSum"}
    assert torch.equal(from_onnx(tmp_path / "model.onnx")(x), model(x))


def small(*nodes: tuple[str, list[str], str], **constants: object) -> onnx.ModelProto:
    """A model of `images` (N, 3, 8, 8) to `output`; nodes are (operator, inputs, output)."""
    made = [onnx.helper.make_node(operator, inputs, [output]) for operator, inputs, output in nodes]
    held = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        made, "small", [info("images", 1, ["n", 3, 8, 8])], [info("output", 1, ["n", None, None, None])], held
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=10)


SCALE, TWICE = {"scale": np.float32(0.5), "zero": np.uint8(3)}, {"double": np.float32(1.0)}


def test_a_reader_has_its_own_scale() -> None:
    """Integers written at one scale and read at another are what the model says, not a mistake to be smoothed out."""
    model = small(
        ("QuantizeLinear", ["images", "scale", "zero"], "stored"),
        ("DequantizeLinear", ["stored", "double", "zero"], "output"),
        **SCALE, **TWICE,
    )  # fmt: skip
    x = images(2, 3, 8, 8) * 4
    expected = ort.InferenceSession(model.SerializeToString()).run(None, {"images": x.numpy()})[0]
    assert np.array_equal(from_onnx(model)(x).numpy(), expected)


def test_a_clamp_of_stored_integers_goes_into_the_layer(rng: np.random.Generator) -> None:
    model = small(
        ("QuantizeLinear", ["images", "scale", "zero"], "a"),
        ("QLinearConv", ["a", "scale", "zero", "weight", "scales", "none", "double", "zero"], "b"),
        ("Clip", ["b", "least", "most"], "c"),
        ("DequantizeLinear", ["c", "double", "zero"], "output"),
        **SCALE, **TWICE, weight=rng.integers(-60, 60, (4, 3, 3, 3), np.int8), none=np.zeros(4, np.int8),
        scales=np.array([0.01, 0.02, 0.03, 0.04], np.float32), least=np.uint8(7), most=np.uint8(20),
    )  # fmt: skip
    x = images(4, 3, 8, 8) * 4
    expected = ort.InferenceSession(model.SerializeToString()).run(None, {"images": x.numpy()})[0]
    assert {4.0, 17.0} <= set(expected.ravel().tolist())
    assert np.array_equal(from_onnx(model)(x).numpy(), expected)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("Floor", ["images"], "a"), ("QuantizeLinear", ["a", "scale", "zero"], "b")], "rounds down"),
        ([("QuantizeLinear", ["images", "scale", "zero"], "a"), ("Clip", ["a", "zero"], "c"),
          ("MaxPool", ["c"], "d"), ("Clip", ["d", "zero"], "b")], "clamps what neither"),
        ([("QuantizeLinear", ["images", "scale", "zero"], "a"), ("DequantizeLinear", ["a", "scale", "other"], "c"),
          ("QuantizeLinear", ["c", "scale", "zero"], "b")], "has zero point 3, and is read with 4"),
        ([("QuantizeLinear", ["images", "scale", "zero"], "a"), ("QuantizeLinear", ["images", "double", "zero"], "c"),
          ("Concat", ["p", "q"], "r"), ("DequantizeLinear", ["a", "scale", "zero"], "p"),
          ("DequantizeLinear", ["c", "double", "zero"], "q"), ("QuantizeLinear", ["r", "scale", "zero"], "b")],
         "images is quantized in two ways"),
        ([("QuantizeLinear", ["images", "scale", "zero"], "a"), ("DequantizeLinear", ["a", "scale", "zero"], "c"),
          ("ReduceSum", ["c"], "d"), ("Mul", ["d", "double"], "e"), ("QuantizeLinear", ["e", "scale", "zero"], "b")],
         "sums something else"),
    ],
)  # fmt: skip
def test_what_has_no_int8_form_is_refused(nodes: list, words: str) -> None:
    order = sorted(nodes, key=lambda node: node[0] == "Concat")  # the reader does not need ONNX's order of nodes
    model = small(*order, ("DequantizeLinear", ["b", "scale", "zero"], "output"), **SCALE, **TWICE, other=np.uint8(4))
    for node in model.graph.node:
        if node.op_type == "MaxPool":
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", [2, 2]))
    with pytest.raises(ValueError, match=words):
        from_onnx(model)


@pytest.mark.parametrize(("activation", "weight"), [("QInt8", "QInt8"), ("QUInt8", "QInt8"), ("QUInt8", "QUInt8")])
def test_models_of_onnxruntimes_quantizer(activation: str, weight: str, tmp_path: Path) -> None:
    from onnxruntime import quantization as q

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 12, 1)
            self.fc = nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.a(x))
            x = torch.relu(self.b(x) + x)
            x = torch.max_pool2d(self.c(x), 2)
            return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

    x = images(16, 3, 16, 16)
    export(Net().eval(), "onnx", tmp_path / "float.onnx", images=x)

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    types = {"activation_type": q.QuantType[activation], "weight_type": q.QuantType[weight]}
    target = tmp_path / "quantized.onnx"
    with warnings.catch_warnings(action="ignore"):
        q.quantize_static(tmp_path / "float.onnx", target, Reader(), per_channel=weight == "QInt8", **types)
    network = from_onnx(target)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # the model's own meaning
    expected = ort.InferenceSession(target, options).run(None, {"images": x.numpy()})[0]
    step = float(np.diff(np.unique(expected)).min())
    assert np.abs(network(x).numpy() - expected).max() <= 1.01 * step
    assert (network(x).argmax(1).numpy() == expected.argmax(1)).mean() >= 0.9


def test_a_node_without_int8_form_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 3)).eval()
    x = images(4, 3, 12, 12)
    export(quantize(model, [x]), "onnx", tmp_path / "model.onnx", images=x)
    with pytest.raises(ValueError, match=r"\(Sigmoid\): has no int8 form.*extract_model"):
        from_onnx(tmp_path / "model.onnx")
