"""QONNX, which FPGA tools such as hls4ml read: the power-of-two network in floats between Quant nodes, all of it exact.

Every weight and every activation goes through a Quant node (domain qonnx.custom_op.general) with a power-of-two scale:
hls4ml turns each into an ap_fixed type, and the multiplication by its scale into the position of the binary point. What
`requantize="shift"` rounds half up, (a + half) >> s, is here as it is in hardware: half a step is part of the bias, and
the Quant node rounds down. A zero point of 128 is written as a signed type; hls4ml's fixed point takes no other but 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from imgopt_fast._arguments import as_pair, as_sides
from imgopt_fast.targets.errors import refuse
from imgopt_fast.targets.network import Layer, Network, Value
from imgopt_fast.targets.onnx_graph import IR_VERSION, Graph
from imgopt_fast.targets.verification import Array, Engine

PACKAGES, VERIFIERS, EXTRA = ("onnx",), ("qonnx",), "fpga"
DOMAIN = "qonnx.custom_op.general"
BITS = 8


def write(network: Network, path: Path) -> list[str]:
    """Write the file `path`; returns what the network costs. ValueError for a layer that fixed point cannot carry."""
    for layer in network.float_layers:
        raise refuse(layer, "qonnx", "it computes in float")
    if not network.shift:
        raise ValueError(
            "model: qonnx wants power-of-two scales; quantize it with Int8Config(power_of_two=True), or take "
            "--format onnx"
        )
    writer = _Writer(network)
    for layer in network.layers:
        writer.layer(layer)
    path.write_bytes(writer.graph.serialize())
    return resources(network)


def resources(network: Network) -> list[str]:
    """Bits per layer, and the multiplications that shifts replace, a line each and one in all."""
    lines, products, shifts, bits = [], 0, 0, 0
    for layer in network.layers:
        if layer.weights is None:
            continue
        out, weight = network.values[layer.output], layer.weights.weight
        pixels = int(np.prod(out.shape[2:])) if len(out.shape) == 4 else 1
        kept = int(weight.count_nonzero())
        sums = _sum_bits(layer)
        scaled = pixels * len(weight)
        lines.append(
            f"{layer.name}: weights {weight.numel()} x {BITS} bits ({kept} not zero), activations {BITS} bits, sums "
            f"{sums} bits, {pixels * kept:,} products, {scaled:,} rescalings by shifts"
        )
        products, shifts, bits = products + pixels * kept, shifts + scaled, bits + weight.numel() * BITS
    return [
        *lines,
        f"in all: {bits / 8192:,.1f} KiB of weights, {products:,} products of {BITS} x {BITS} bits, {shifts:,} "
        f"multiplications replaced by shifts",
    ]


def _sum_bits(layer: Layer) -> int:
    """Width of the accumulator of a layer, sign included, for any input."""
    assert layer.weights is not None
    weights = layer.weights.weight.flatten(1).long()
    zero, bias = layer.weights.input_zero_point, layer.weights.bias.long()
    positive, negative = weights.clamp(min=0).sum(1), -weights.clamp(max=0).sum(1)
    highest = int((bias + positive * (255 - zero) + negative * zero).max())
    lowest = int((bias - positive * zero - negative * (255 - zero)).min())
    return max(highest.bit_length(), (-lowest - 1).bit_length() if lowest < 0 else 0) + 1


class _Writer:
    """Writes the layers one by one; the value of each is real, in float32, and exact."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.graph = Graph(network, domains={DOMAIN: 1})

    def layer(self, layer: Layer) -> None:
        inputs = [self.graph.names[value] for value in layer.inputs]
        out, name = self.network.values[layer.output], self.graph.names[layer.output]
        if layer.kind == "quantize":
            self._quant(inputs[0], out, name, "ROUND")
        elif layer.kind == "flatten":
            self.graph.node("Flatten", inputs, name)
        elif layer.kind == "dequantize":
            self.graph.node("Identity", inputs, name)
        elif layer.kind == "max_pool2d":
            self.graph.node("MaxPool", inputs, name, **self._window(layer))
        elif layer.weights is not None:
            self._product(layer, inputs[0], out, name)
        else:
            self._store(layer, self._raised(layer, self._passive(layer, inputs)), name)

    def _passive(self, layer: Layer, inputs: list[str]) -> str:
        made = f"{layer.name}_real"
        if layer.kind == "add":
            return self.graph.node("Add", inputs, made)
        if layer.kind == "concat":
            return self.graph.node("Concat", inputs, made, axis=1)
        if layer.kind == "rescale":
            return inputs[0]
        if layer.kind == "global_avg_pool2d":
            return self.graph.node("GlobalAveragePool", inputs, made)
        if layer.kind == "avg_pool2d" and layer.attributes.get("count_include_pad", True):
            return self.graph.node("AveragePool", inputs, made, count_include_pad=1, **self._window(layer))
        raise refuse(layer, "qonnx", "it has no fixed-point form here")

    def _window(self, layer: Layer) -> dict[str, Any]:
        top, left, bottom, right = (as_sides(layer.attributes["padding"])[i] for i in (0, 2, 1, 3))
        return {
            "kernel_shape": as_pair("kernel_size", layer.attributes["kernel_size"], 1),
            "strides": as_pair("stride", layer.attributes["stride"], 1),
            "pads": [top, left, bottom, right],
        }

    def _product(self, layer: Layer, source: str, out: Value, name: str) -> None:
        assert layer.weights is not None
        graph, weights = self.graph, layer.weights
        scale = weights.weight_scale.double().numpy()
        stored = weights.weight.numpy().astype(np.float64)
        convolution = layer.kind == "conv2d"
        steps = scale.reshape(-1, 1, 1, 1)
        real, bias = stored * steps, weights.bias.double().numpy() * weights.input_scale * scale
        if not convolution:
            real, steps = real[:, :, 0, 0].T, steps[:, :, 0, 0].T
        if out.quantized:
            bias = bias + out.scale / 2
        self._check_exact(layer, bias)
        weight = self._quant_node(
            graph.constant(f"{layer.name}_weight_real", real, np.float32),
            steps,
            0,
            True,
            1,
            f"{layer.name}_weight",
            "ROUND",
        )
        bias = bias.reshape((1, -1, 1, 1) if convolution else (1, -1))
        offset = graph.constant(f"{layer.name}_bias", bias, np.float32)
        product = f"{layer.name}_product"
        if convolution:
            top, left, bottom, right = (as_sides(layer.attributes["padding"])[i] for i in (0, 2, 1, 3))
            graph.node(
                "Conv", [source, weight], product, kernel_shape=list(weights.weight.shape[2:]),
                strides=as_pair("stride", layer.attributes["stride"], 1), pads=[top, left, bottom, right],
                dilations=as_pair("dilation", layer.attributes["dilation"], 1), group=weights.groups,
            )  # fmt: skip
        else:
            graph.node("MatMul", [source, weight], product)
        plain = layer.residual is None and not out.quantized and not self.network.clamps(layer)
        made = graph.node("Add", [product, offset], name if plain else f"{layer.name}_sums")
        if layer.residual is not None:
            made = graph.node("Add", [made, graph.names[layer.residual]], f"{layer.name}_with_residual")
        if not out.quantized and not plain:
            raise refuse(layer, "qonnx", "the last layer gives its sums, with neither residual nor clamp")
        if out.quantized:
            self._store(layer, made, name)

    def _check_exact(self, layer: Layer, bias: Array) -> None:
        """The bias with its half step must be a float32, or the engine would round it."""
        if not np.array_equal(bias.astype(np.float32).astype(np.float64), bias):
            raise refuse(layer, "qonnx", "its bias and half a step of its output do not fit into one float32")

    def _raised(self, layer: Layer, real: str) -> str:
        half = self.graph.constant(f"{layer.name}_half", self.network.values[layer.output].scale / 2, np.float32)
        return self.graph.node("Add", [real, half], f"{layer.name}_raised")

    def _store(self, layer: Layer, real: str, name: str) -> None:
        """Round down, saturate; and clamp, where a Quant node's range does not do it."""
        out = self.network.values[layer.output]
        if layer.kind == "rescale" or not self.network.clamps(layer):
            self._quant(real, out, name, "FLOOR")
            return
        rounded = self._quant(real, out, f"{name}_rounded", "FLOOR")
        low, high = ((step - out.zero_point) * out.scale for step in self.network.steps(layer))
        if high == (255 - out.zero_point) * out.scale and low == 0:
            self.graph.node("Relu", [rounded], name)
            return
        bounds = [
            self.graph.constant(f"{layer.name}_{side}", v, np.float32) for side, v in (("min", low), ("max", high))
        ]
        self.graph.node("Clip", [rounded, *bounds], name)

    def _quant(self, real: str, out: Value, name: str, rounding: str) -> str:
        signed = out.zero_point == 128
        return self._quant_node(real, np.asarray(out.scale), 0 if signed else out.zero_point, signed, 0, name, rounding)

    def _quant_node(
        self, real: str, scale: Array, zero: int, signed: bool, narrow: int, name: str, rounding: str
    ) -> str:  # fmt: skip
        constant = self.graph.constant
        inputs = [real, constant(f"{name}_scale", scale, np.float32), constant(f"{name}_zeropt", zero, np.float32),
                  constant(f"{name}_bits", BITS, np.float32)]  # fmt: skip
        return self.graph.node("Quant", inputs, name, DOMAIN, signed=int(signed), narrow=narrow, rounding_mode=rounding)


@contextmanager
def readable() -> Iterator[None]:
    """Let what qonnx runs node by node be read by onnxruntime.

    qonnx makes its models in the newest format that onnx knows, which may be newer than onnxruntime (1.31 stops at IR
    version 13, onnx 1.23 writes 14).
    """
    with patch.object(import_module("onnx"), "IR_VERSION", IR_VERSION):
        yield


def engines(path: Path, network: Network) -> list[Engine]:
    """qonnx's own execution of the file, node by node: each is a session of its own, whatever the batch."""
    version = import_module("importlib.metadata").version("qonnx")
    wrapper, execute = import_module("qonnx.core.modelwrapper"), import_module("qonnx.core.onnx_exec")
    infer = import_module("qonnx.transformation.infer_shapes")

    def run(images: Array) -> list[Array]:
        model = wrapper.ModelWrapper(str(path))
        model.set_tensor_shape("images", list(images.shape))
        model = model.transform(infer.InferShapes())
        with readable():
            results = execute.execute_onnx(model, {"images": images})
        return [results[o.name] for o in model.graph.output]

    return [Engine(f"qonnx {version}", run, exact=True)]
