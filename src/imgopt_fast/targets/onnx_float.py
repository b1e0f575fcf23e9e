"""The float layers of a network, which torch.export knows as ATen operations, in ONNX's standard operators."""

from collections.abc import Callable
from typing import Any

import numpy as np

from imgopt_fast.compress.quantize.fuse import CLAMPS
from imgopt_fast.compress.quantize.trace import aten
from imgopt_fast.targets.errors import refuse
from imgopt_fast.targets.network import Layer, Use
from imgopt_fast.targets.onnx_graph import Graph, pair


def write_float_layer(graph: Graph, layer: Layer) -> None:
    """Add the nodes of an ATen operation. Raises ValueError for one that is not in the table below."""
    emit = _LAYERS.get(layer.operation)
    if emit is None:
        raise refuse(layer, "onnx", "no ONNX form is known here")
    emit(graph, layer, graph.names[layer.output], _Arguments(graph, layer))


class _Arguments:
    """The arguments of an ATen operation as ONNX takes them: names of tensors, plain numbers."""

    def __init__(self, graph: Graph, layer: Layer) -> None:
        self.graph, self.layer = graph, layer

    def tensor(self, argument: str) -> str:
        """Name of a tensor; a number becomes a constant."""
        value = self.layer.attributes[argument]
        if isinstance(value, Use):
            return self.graph.names[value.value]
        return self.graph.constant(f"{self.layer.name}_{argument}_{self.layer.output}", value, np.float32)

    def optional(self, *arguments: str) -> list[str]:
        return [self.tensor(name) for name in arguments if self.layer.attributes[name] is not None]

    def weight(self, argument: str) -> str:
        """A constant weight, packed if it is mostly zeros."""
        value = self.layer.attributes[argument].value
        if value not in self.graph.network.constants:
            return self.graph.names[value]
        name = self.graph.names[value]
        if f"{name}_packed" not in self.graph.made:
            self.graph.weight(f"{name}_packed", self.graph.network.tensors[value].numpy())
        return f"{name}_packed"

    def __getitem__(self, argument: str) -> Any:
        return self.layer.attributes[argument]


Emit = Callable[[Graph, Layer, str, _Arguments], None]


def _same(operator: str, *names: str, **attributes: Any) -> Emit:
    """An ATen operation that ONNX has too, on the tensors `names`."""

    def emit(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
        graph.node(operator, [a.tensor(name) for name in names], out, **attributes)

    return emit


def _convolution(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    kernel = list(graph.network.values[a["weight"].value].shape[2:])
    dilation = pair(a["dilation"])
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if a["padding"] == "same":
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = [0] * 4 if a["padding"] == "valid" else pair(a["padding"]) * 2
    inputs = [a.tensor("input"), a.weight("weight"), *a.optional("bias")]
    graph.node("Conv", inputs, out, kernel_shape=kernel, strides=pair(a["stride"]), pads=pads, dilations=dilation,
               group=a["groups"])  # fmt: skip


def _linear(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    if len(graph.network.values[a["input"].value].shape) != 2:
        raise refuse(layer, "onnx", "a linear layer over more than one axis")
    graph.node("Gemm", [a.tensor("input"), a.weight("weight"), *a.optional("bias")], out, transB=1)


def _clip(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    low, high = _clamp_bounds(layer)
    bounds = ["" if v is None else graph.constant(f"{out}_{side}", v, np.float32) for side, v in
              (("min", low), ("max", high))]  # fmt: skip
    graph.node("Clip", [a.tensor("self"), *bounds], out)


def _clamp_bounds(layer: Layer) -> tuple[Any, Any]:
    low, high = (layer.attributes[b] if isinstance(b, str) else b for b in CLAMPS[layer.operation])
    return low, high


def _silu(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    graph.node("Mul", [a.tensor("self"), graph.node("Sigmoid", [a.tensor("self")], f"{out}_gate")], out)


def _pool(operator: str) -> Emit:
    def emit(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
        kernel = pair(a["kernel_size"])
        attributes: dict[str, Any] = {
            "strides": pair(a["stride"]) if a["stride"] else kernel,
            "pads": pair(a["padding"]) * 2,
        }
        if operator == "AveragePool":
            if a["divisor_override"]:
                raise refuse(layer, "onnx", "divisor_override")
            attributes["count_include_pad"] = int(a["count_include_pad"])
        else:
            attributes["dilations"] = pair(a["dilation"])
        graph.node(operator, [a.tensor("self")], out, kernel_shape=kernel, ceil_mode=int(a["ceil_mode"]), **attributes)

    return emit


def _adaptive_pool(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    if pair(a["output_size"]) != [1, 1]:
        raise refuse(layer, "onnx", "an adaptive pool to more than one pixel")
    graph.node("GlobalAveragePool", [a.tensor("self")], out)


def _mean(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    graph.node("ReduceMean", [a.tensor("self"), graph.constant(f"{out}_axes", a["dim"], np.int64)], out,
               keepdims=int(a["keepdim"]))  # fmt: skip


def _reshape(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    shape = graph.constant(f"{out}_shape", [-1, *graph.network.values[layer.output].shape[1:]], np.int64)
    graph.node("Reshape", [a.tensor("self"), shape], out)


def _concat(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    graph.node("Concat", [graph.names[use.value] for use in a["tensors"]], out, axis=a["dim"])


def _sum(operator: str) -> Emit:
    def emit(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
        if a["alpha"] != 1:
            raise refuse(layer, "onnx", "alpha other than 1")
        graph.node(operator, [a.tensor("self"), a.tensor("other")], out)

    return emit


def _permute(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    graph.node("Transpose", [a.tensor("self")], out, perm=[axis % len(a["dims"]) for axis in a["dims"]])


def _softmax(graph: Graph, layer: Layer, out: str, a: _Arguments) -> None:
    graph.node("Softmax", [a.tensor("self")], out, axis=a["dim"])


_LAYERS: dict[Any, Emit] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.linear.default: _linear,
    aten.relu.default: _same("Relu", "self"),
    aten.relu6.default: _clip,
    aten.hardtanh.default: _clip,
    aten.clamp.default: _clip,
    aten.clamp_min.default: _clip,
    aten.clamp_max.default: _clip,
    aten.sigmoid.default: _same("Sigmoid", "self"),
    aten.tanh.default: _same("Tanh", "self"),
    aten.silu.default: _silu,
    aten.hardsigmoid.default: _same("HardSigmoid", "self", alpha=1 / 6, beta=0.5),
    aten.hardswish.default: _same("HardSwish", "self"),
    aten.add.Tensor: _sum("Add"),
    aten.sub.Tensor: _sum("Sub"),
    aten.mul.Tensor: _same("Mul", "self", "other"),
    aten.div.Tensor: _same("Div", "self", "other"),
    aten.matmul.default: _same("MatMul", "self", "other"),
    aten.softmax.int: _softmax,
    aten.cat.default: _concat,
    aten.max_pool2d.default: _pool("MaxPool"),
    aten.avg_pool2d.default: _pool("AveragePool"),
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.mean.dim: _mean,
    aten.permute.default: _permute,
    aten.flatten.using_ints: _reshape,
    aten.view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.squeeze.dims: _reshape,
    aten.unsqueeze.default: _reshape,
}
