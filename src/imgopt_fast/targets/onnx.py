"""ONNX: int8 networks between QuantizeLinear and DequantizeLinear (QDQ), or in integer operators; float networks too.

QDQ is what engines fuse: each layer stands in float between the dequantized and the quantized tensors, per-channel
weights and int32 biases behind DequantizeLinear. In the "qlinear" form every step is written as integers: QLinearConv
for the convolutions that it can say, and elsewhere ConvInteger or MatMulInteger followed by the very float32 operations
of `int8_conv2d`, so that nothing is left to an engine's choice. Standard operators only, opset 19, the batch
size free.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from imgopt_fast._arguments import as_sides
from imgopt_fast.ops.int8_conv2d.reference import INTEGER_RANGE
from imgopt_fast.ops.int8_graph.constants import multipliers
from imgopt_fast.targets.errors import refuse
from imgopt_fast.targets.fresh_process import openvino
from imgopt_fast.targets.network import FLOAT, Layer, Network
from imgopt_fast.targets.onnx_float import write_float_layer
from imgopt_fast.targets.onnx_graph import Graph, pair
from imgopt_fast.targets.verification import Array, Engine

PACKAGES, VERIFIERS, EXTRA = ("onnx",), ("onnxruntime", "openvino"), "onnx"
Form = Literal["qdq", "qlinear"]


def write(network: Network, path: Path, *, form: Form = "qdq") -> None:
    """Write `network` to the file `path`. Raises ValueError for a layer that ONNX, or this exporter, cannot carry."""
    if form not in ("qdq", "qlinear"):
        raise ValueError(f"form: expected 'qdq' or 'qlinear', got {form!r}")
    model = Graph(network)
    quantized = _QdqForm(model) if form == "qdq" else _IntegerForm(model)
    for layer in network.layers:
        if layer.kind == FLOAT:
            write_float_layer(model, layer)
        else:
            getattr(quantized, layer.kind)(layer)
    path.write_bytes(model.serialize())


# --- engines ----------------------------------------------------------------------------------------------------------


def engines(path: Path, network: Network, *, form: Form = "qdq") -> list[Engine]:
    """onnxruntime and OpenVINO on the file `path`; OpenVINO 2026.4 refuses QLinearConv with a scale per channel."""
    runtimes = [_onnxruntime, _openvino] if form == "qdq" else [_onnxruntime]
    return [runtime(path, network) for runtime in runtimes]


def _onnxruntime(path: Path, network: Network) -> Engine:
    onnx, ort = import_module("onnx"), import_module("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3

    def session(model: bytes) -> Any:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    plain = session(path.read_bytes())

    shown = _quantized_names(network)

    def inspect(images: Array) -> dict[str, Array]:
        model = onnx.load(path)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
        return dict(zip(shown, session(model.SerializeToString()).run(shown, {"images": images}), strict=True))

    def run(images: Array) -> list[Array]:
        return list(plain.run(None, {"images": images}))

    return Engine(f"onnxruntime {ort.__version__}", run, inspect if shown else None)


def _openvino(path: Path, network: Network) -> Engine:
    shown = _quantized_names(network)
    call = openvino(path, shown, torch.get_num_threads())

    def inspect(images: Array) -> dict[str, Array]:
        return dict(zip(shown, call(images, 1), strict=True))

    name = f"openvino {import_module('importlib.metadata').version('openvino')}"
    return Engine(name, lambda x: call(x, 0), inspect if shown else None, seconds=lambda x: float(call(x, 2)[0]))


def _quantized_names(network: Network) -> list[str]:
    """Names of the int8 values, in the file and here."""
    return [value.name for value in network.values if value.quantized]


# --- int8 layers ------------------------------------------------------------------------------------------------------


class _Form:
    """What both forms of the int8 layers share."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.network = graph, graph.network

    def quantization(self, value: int) -> list[str]:
        """Names of scale and zero point of a value."""
        described, name = self.network.values[value], self.graph.names[value]
        return [
            self.graph.constant(f"{name}_scale", described.scale, np.float32),
            self.graph.constant(f"{name}_zero_point", described.zero_point, _numpy(described.dtype)),
        ]

    def stored(self, value: int) -> str:
        return self.graph.names[value]

    def window(self, layer: Layer) -> dict[str, Any]:
        """ONNX attributes of a convolution or pool."""
        given = layer.attributes
        kernel = pair(given["kernel_size"]) if layer.weights is None else list(layer.weights.weight.shape[2:])
        top, bottom, left, right = as_sides(given["padding"])
        attributes: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": pair(given["stride"]),
            "pads": [top, left, bottom, right],
        }
        if layer.weights is not None:
            attributes |= {"dilations": pair(given["dilation"]), "group": layer.weights.groups}
        return attributes


class _QdqForm(_Form):
    """Every layer in float, between the dequantized tensors that it reads and the quantized one that it makes."""

    def real(self, value: int, reader: Layer) -> str:
        """The value dequantized for one reader: engines fuse a DequantizeLinear that has one only."""
        if not self.network.values[value].quantized:
            return self.stored(value)
        name = f"{reader.name}_from_{self.stored(value)}"
        if name in self.graph.made:
            return name
        return self.graph.node("DequantizeLinear", [self.stored(value), *self.quantization(value)], name)

    def store(self, layer: Layer, made: Callable[[str], str]) -> None:
        """`made` names the float result and writes its nodes; clamp and quantize that."""
        name, out = self.stored(layer.output), self.network.values[layer.output]
        clamped = layer.kind != "rescale" and self.network.clamps(layer)
        stages = [f"{layer.name}_real"] * (clamped or out.quantized) + [f"{layer.name}_clamped"] * clamped
        stages = stages if out.quantized else stages[:-1]
        current = made(stages[0] if stages else name)
        if clamped:
            low, high = (layer.attributes.get(bound) for bound in ("output_min", "output_max"))
            bounds = [
                "" if bound is None else self.graph.constant(f"{layer.name}_{side}", bound, np.float32)
                for side, bound in (("min", low), ("max", high))
            ]
            current = self.graph.node("Clip", [current, *bounds], stages[1] if len(stages) > 1 else name)
        if out.quantized:
            self.graph.node("QuantizeLinear", [current, *self.quantization(layer.output)], name)

    def quantize(self, layer: Layer) -> None:
        source = self.stored(layer.inputs[0])
        self.graph.node("QuantizeLinear", [source, *self.quantization(layer.output)], self.stored(layer.output))

    def dequantize(self, layer: Layer) -> None:
        inputs = [self.stored(layer.inputs[0]), *self.quantization(layer.inputs[0])]
        self.graph.node("DequantizeLinear", inputs, self.stored(layer.output))

    def conv2d(self, layer: Layer) -> None:
        self._layer(layer, "Conv", **self.window(layer))

    def linear(self, layer: Layer) -> None:
        self._layer(layer, "Gemm", transB=1)

    def _layer(self, layer: Layer, operator: str, **attributes: Any) -> None:
        assert layer.weights is not None
        weights, graph, name = layer.weights, self.graph, layer.name
        array = weights.weight.numpy() if operator == "Conv" else weights.weight.flatten(1).numpy()
        scale = graph.constant(f"{name}_weight_scale", weights.weight_scale.numpy())
        zero = graph.constant(f"{name}_weight_zero_point", np.zeros(len(array)), np.int8)
        weight = graph.weight(f"{name}_weight_int8", array)
        weight = graph.node("DequantizeLinear", [weight, scale, zero], f"{name}_weight", axis=0)
        bias_scale = (weights.input_scale * weights.weight_scale.double()).float().numpy()
        scale = graph.constant(f"{name}_bias_scale", bias_scale)
        bias = graph.constant(f"{name}_bias_int32", weights.bias.numpy())
        zero = graph.constant(f"{name}_bias_zero_point", np.zeros(len(array)), np.int32)
        bias = graph.node("DequantizeLinear", [bias, scale, zero], f"{name}_bias", axis=0)
        inputs = [self.real(layer.inputs[0], layer), weight, bias]

        def made(result: str) -> str:
            if layer.residual is None:
                return graph.node(operator, inputs, result, **attributes)
            product = graph.node(operator, inputs, f"{name}_product", **attributes)
            return graph.node("Add", [product, self.real(layer.residual, layer)], result)

        self.store(layer, made)

    def add(self, layer: Layer) -> None:
        self._plain(layer, "Add")

    def concat(self, layer: Layer) -> None:
        self._plain(layer, "Concat", axis=1)

    def max_pool2d(self, layer: Layer) -> None:
        self._plain(layer, "MaxPool", **self.window(layer))

    def avg_pool2d(self, layer: Layer) -> None:
        counted = int(layer.attributes.get("count_include_pad", True))
        self._plain(layer, "AveragePool", **self.window(layer), count_include_pad=counted)

    def global_avg_pool2d(self, layer: Layer) -> None:
        self._plain(layer, "GlobalAveragePool")

    def flatten(self, layer: Layer) -> None:
        self._plain(layer, "Flatten")

    def rescale(self, layer: Layer) -> None:
        """A clamp to the range of its scale, which has to be written: OpenVINO 2026.4 crashes on Q, DQ, Q alone."""
        out, name = self.network.values[layer.output], self.stored(layer.output)
        low, high = ((step - out.zero_point) * out.scale for step in INTEGER_RANGE[out.dtype])
        bounds = [self.graph.constant(f"{name}_{side}", v, np.float32) for side, v in (("min", low), ("max", high))]
        self.store(layer, lambda made: self.graph.node("Clip", [self.real(layer.inputs[0], layer), *bounds], made))

    def _plain(self, layer: Layer, operator: str, **attributes: Any) -> None:
        inputs = [self.real(value, layer) for value in layer.inputs]
        self.store(layer, lambda result: self.graph.node(operator, inputs, result, **attributes))


class _IntegerForm(_Form):
    """Every layer on stored integers, with the float32 operations of `int8_conv2d` between sums and results."""

    def steps_of(self, value: int, factor: float, reader: Layer) -> str:
        """f32(stored - zero_point) * f32(factor): what DequantizeLinear computes."""
        name = f"{reader.name}_from_{self.stored(value)}"
        if name in self.graph.made:
            return name
        zero = self.quantization(value)[1]
        scale = self.graph.constant(f"{name}_factor", factor, np.float32)
        return self.graph.node("DequantizeLinear", [self.stored(value), scale, zero], name)

    def round_to(self, layer: Layer, steps: str) -> None:
        """Round, add the zero point, saturate: QuantizeLinear at scale 1. Half goes to even, with shifts up."""
        graph, name = self.graph, self.stored(layer.output)
        if self.network.shift and layer.kind != "quantize":
            half = graph.constant("half", 0.5, np.float32)
            steps = graph.node("Floor", [graph.node("Add", [steps, half], f"{name}_raised")], f"{name}_floor")
        scale = graph.constant("one", 1.0, np.float32)
        inputs = [steps, scale, self.quantization(layer.output)[1]]
        if layer.kind == "rescale" or not self.network.clamps(layer):
            graph.node("QuantizeLinear", inputs, name)
        else:
            self.clip(layer, graph.node("QuantizeLinear", inputs, f"{name}_saturated"))

    def clip(self, layer: Layer, stored: str) -> None:
        """The layer's clamp on stored values: rounding first gives the same, both being monotonic."""
        dtype = _numpy(self.network.values[layer.output].dtype)
        names = [f"{layer.name}_least", f"{layer.name}_most"]
        bounds = [self.graph.constant(n, v, dtype) for n, v in zip(names, self.network.steps(layer), strict=True)]
        self.graph.node("Clip", [stored, *bounds], self.stored(layer.output))

    def ratio(self, value: int, layer: Layer) -> float:
        return self.network.values[value].scale / self.network.values[layer.output].scale

    def quantize(self, layer: Layer) -> None:
        factor = np.float32(1.0 / self.network.values[layer.output].scale)
        name = self.graph.constant(f"{self.stored(layer.output)}_factor", factor, np.float32)
        self.round_to(layer, self.graph.node("Mul", [self.stored(layer.inputs[0]), name], f"{layer.name}_steps"))

    def dequantize(self, layer: Layer) -> None:
        inputs = [self.stored(layer.inputs[0]), *self.quantization(layer.inputs[0])]
        self.graph.node("DequantizeLinear", inputs, self.stored(layer.output))

    def conv2d(self, layer: Layer) -> None:
        assert layer.weights is not None
        graph, name, weights = self.graph, layer.name, layer.weights
        weight = graph.weight(f"{name}_weight", weights.weight.numpy())
        source, (scale, zero) = self.stored(layer.inputs[0]), self.quantization(layer.inputs[0])
        quantized = self.network.values[layer.output].quantized
        if self.network.shift or layer.residual is not None or not quantized:
            inputs = [source, weight, zero]
            sums = graph.node("ConvInteger", inputs, f"{name}_products", **self.window(layer))
            self._requantize(layer, sums, (1, -1, 1, 1))
            return
        inputs = [
            source, scale, zero, weight,
            graph.constant(f"{name}_weight_scale", weights.weight_scale.numpy()),
            graph.constant(f"{name}_weight_zero_point", np.zeros(len(weights.weight)), np.int8),
            *self.quantization(layer.output),
            graph.constant(f"{name}_bias", weights.bias.numpy()),
        ]  # fmt: skip
        clamped = self.network.clamps(layer)
        result = f"{self.stored(layer.output)}_saturated" if clamped else self.stored(layer.output)
        graph.node("QLinearConv", inputs, result, **self.window(layer))
        if clamped:
            self.clip(layer, result)

    def linear(self, layer: Layer) -> None:
        assert layer.weights is not None
        weight = self.graph.weight(f"{layer.name}_weight", layer.weights.weight.flatten(1).t().contiguous().numpy())
        inputs = [self.stored(layer.inputs[0]), weight, self.quantization(layer.inputs[0])[1]]
        self._requantize(layer, self.graph.node("MatMulInteger", inputs, f"{layer.name}_products"), (1, -1))

    def _requantize(self, layer: Layer, products: str, shape: tuple[int, ...]) -> None:
        """f32(sum) * m[o], plus the residual at the output's scale, rounded."""
        assert layer.weights is not None
        graph, name, out = self.graph, layer.name, self.network.values[layer.output]
        bias = graph.constant(f"{name}_bias", layer.weights.bias.view(shape).numpy())
        sums = graph.node("Add", [products, bias], f"{name}_sums")
        factors = multipliers(layer.weights, out.scale).view(shape).numpy()
        real = graph.node("Cast", [sums], f"{name}_float_sums", to=1)  # float32
        plain = layer.residual is None and not out.quantized and not self.network.clamps(layer)
        scale = graph.constant(f"{name}_multiplier", factors)
        steps = graph.node("Mul", [real, scale], self.stored(layer.output) if plain else f"{name}_steps")
        if layer.residual is not None:
            added = self.steps_of(layer.residual, self.ratio(layer.residual, layer), layer)
            steps = graph.node("Add", [steps, added], f"{name}_with_residual")
        if out.quantized:
            self.round_to(layer, steps)
        elif not plain:
            bounds = [layer.attributes[bound] for bound in ("output_min", "output_max")]
            names = [
                "" if bound is None else graph.constant(f"{name}_{side}", bound, np.float32)
                for side, bound in zip(("min", "max"), bounds, strict=True)
            ]
            graph.node("Clip", [steps, *names], self.stored(layer.output))

    def add(self, layer: Layer) -> None:
        parts = [self.steps_of(value, self.ratio(value, layer), layer) for value in layer.inputs]
        self.round_to(layer, self.graph.node("Add", parts, f"{layer.name}_steps"))

    def concat(self, layer: Layer) -> None:
        parts = [self.steps_of(value, self.ratio(value, layer), layer) for value in layer.inputs]
        self.round_to(layer, self.graph.node("Concat", parts, f"{layer.name}_steps", axis=1))

    def rescale(self, layer: Layer) -> None:
        self.round_to(layer, self.steps_of(layer.inputs[0], self.ratio(layer.inputs[0], layer), layer))

    def max_pool2d(self, layer: Layer) -> None:
        self.graph.node("MaxPool", [self.stored(layer.inputs[0])], self.stored(layer.output), **self.window(layer))

    def avg_pool2d(self, layer: Layer) -> None:
        """Exact sums as a depthwise convolution with ones."""
        if not layer.attributes.get("count_include_pad", True):
            raise refuse(layer, "onnx", "an average that leaves its padding out has no integer form")
        window, channels = self.window(layer), self.network.values[layer.inputs[0]].shape[1]
        ones = np.ones((channels, 1, *window["kernel_shape"]), np.float32)
        inputs = [self.steps_of(layer.inputs[0], 1.0, layer), self.graph.constant(f"{layer.name}_ones", ones)]
        sums = self.graph.node("Conv", inputs, f"{layer.name}_sums", group=channels, **window)
        self._average(layer, sums, window["kernel_shape"][0] * window["kernel_shape"][1])

    def global_avg_pool2d(self, layer: Layer) -> None:
        height, width = self.network.values[layer.inputs[0]].shape[2:]
        inputs = [self.steps_of(layer.inputs[0], 1.0, layer), self.graph.constant("pixels", [2, 3], np.int64)]
        self._average(layer, self.graph.node("ReduceSum", inputs, f"{layer.name}_sums"), height * width)

    def _average(self, layer: Layer, sums: str, count: int) -> None:
        ratio = self.ratio(layer.inputs[0], layer)
        if self.network.shift:  # a quotient: its ties are exact
            operator, number = "Div", count / ratio
        else:
            operator, number = "Mul", ratio / count
        factor = self.graph.constant(f"{layer.name}_factor", number, np.float32)
        self.round_to(layer, self.graph.node(operator, [sums, factor], f"{layer.name}_steps"))

    def flatten(self, layer: Layer) -> None:
        self.graph.node("Flatten", [self.stored(layer.inputs[0])], self.stored(layer.output))


def _numpy(dtype: torch.dtype) -> Any:
    return np.int8 if dtype == torch.int8 else np.uint8
