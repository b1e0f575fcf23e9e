"""Quantized ONNX models on int8_graph: onnx's own node tests, our exports, and what onnxruntime's quantizer makes."""

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import images
from torch import nn

from imgopt_fast import export
from imgopt_fast.compress import from_onnx, quantize

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


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


@pytest.mark.parametrize("form", ["qdq", "qlinear"])
def test_our_own_exports_come_back(form: str, tmp_path: Path, inverted_bottlenecks: nn.Module) -> None:
    x = images(8, 3, 24, 24)
    if form == "qlinear":  # its residual sums are written as float32 operations on integers, which stay ONNX's
        layers = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.MaxPool2d(2)]
        model = quantize(nn.Sequential(*layers, nn.Conv2d(8, 4, 1)).eval(), [x])
        export(model, "onnx", tmp_path / "model.onnx", images=x, form=form)
        with pytest.raises(ValueError, match=r"\(Mul\).*onnx\.utils\.extract_model"):
            from_onnx(tmp_path / "model.onnx")
        return
    model = quantize(inverted_bottlenecks, [x])
    export(model, "onnx", tmp_path / "model.onnx", images=x, form=form)
    network = from_onnx(tmp_path / "model.onnx")
    assert torch.equal(network(x), model(x))
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(x), model(x))


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
    with pytest.raises(ValueError, match=r"\(Conv\): computes in float.*extract_model"):
        from_onnx(tmp_path / "model.onnx")
