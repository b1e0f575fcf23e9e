"""An ONNX graph to look things up in: who makes a tensor, what is constant, how a tensor is quantized."""

from importlib import import_module
from typing import Any

import numpy as np
import torch

from imgopt_fast.compress.from_onnx.products import Array, Scale, centred

DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.int8): torch.int8}
PASSING = ("Identity", "Dropout")
WAY_OUT = "quantize it too, or cut it off with onnx.utils.extract_model and run it in torch"


class OnnxGraph:
    """The graph of a model with every node computed whose inputs are constants."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.graph
        self.helper, numpy_helper = import_module("onnx.helper"), import_module("onnx.numpy_helper")
        self.constants: dict[str, Array] = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.inputs = {i.name: i for i in self.graph.input if i.name not in self.constants}
        self._fold()
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, int] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1

    def _fold(self) -> None:
        """Compute every node whose inputs are constants, but for the dequantization of weights."""
        reference = import_module("onnx.reference")
        for node in self.graph.node:
            ready = all(not name or name in self.constants for name in node.input)
            if not ready or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                continue
            opsets = {o.domain: o.version for o in self.model.opset_import}
            evaluator = reference.ReferenceEvaluator(node, opsets=opsets)
            results = evaluator.run(None, {name: self.constants[name] for name in node.input if name})
            self.constants |= dict(zip(node.output, map(np.asarray, results), strict=True))

    def maker(self, name: str) -> Any:
        """The node that makes the tensor `name`."""
        if name not in self.makers:
            raise ValueError(f"{name}: is no result of a node; weights have to be initializers")
        return self.makers[name]

    def kind(self, name: str) -> str:
        """The operator that makes the tensor `name`; "" for an input or a constant."""
        node = self.makers.get(name)
        return "" if node is None or name in self.constants else str(node.op_type)

    def given(self, node: Any, index: int) -> bool:
        """Whether the node has its optional input number `index`."""
        return len(node.input) > index and bool(node.input[index])

    def constant(self, node: Any, index: int) -> Array:
        name = node.input[index]
        if name not in self.constants:
            raise self.refuse(node, f"its input {name} is not constant")
        return self.constants[name]

    def bound(self, node: Any, index: int) -> float | None:
        """The constant that a Clip has there, if it has one."""
        return float(self.constant(node, index).reshape(())) if self.given(node, index) else None

    def scale(self, node: Any, scale: int, zero_point: int) -> Scale:
        """Scale and zero point among a node's inputs, per tensor."""
        values = self.constant(node, scale)
        zero = self.constant(node, zero_point) if self.given(node, zero_point) else None
        dtype = np.dtype(np.uint8) if zero is None else zero.dtype
        if values.size != 1 or dtype not in DTYPES:
            raise self.refuse(node, f"activations of {dtype} with {values.size} scales have no int8 form here")
        return Scale(float(values.reshape(())), 0 if zero is None else int(zero.reshape(())), DTYPES[dtype])

    def weight(self, node: Any, name: str) -> tuple[Array, Array]:
        """(stored - zero point, scale per channel or one) behind a DequantizeLinear on constants."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in self.constants:
            raise self.refuse(node, f"its weight {name} is not a quantized constant")
        zero = self.constant(maker, 2) if self.given(maker, 2) else np.zeros(1)
        steps = centred(self.constant(maker, 0), zero, self.attributes(maker).get("axis", 1))
        return steps, self.constant(maker, 1)

    def bias(self, node: Any, index: int) -> Array | None:
        """In real units."""
        if not self.given(node, index):
            return None
        name = node.input[index]
        if name in self.constants:
            return self.constants[name].astype(np.float64)
        steps, scale = self.weight(node, name)
        return np.asarray(steps.astype(np.float64) * scale.astype(np.float64))

    def attributes(self, node: Any) -> dict[str, Any]:
        found = {a.name: self.helper.get_attribute_value(a) for a in node.attribute}
        if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise self.refuse(node, "auto_pad depends on the image size: run onnx's shape inference and write pads")
        return found

    def pads(self, node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) of a convolution or pool."""
        a = self.attributes(node)
        if a.get("ceil_mode", 0):
            raise self.refuse(node, "ceil_mode has no int8 form")
        top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
        return (top, bottom), (left, right)

    def window(self, node: Any) -> dict[str, Any]:
        """Stride, padding, dilation and groups of a convolution over images."""
        a = self.attributes(node)
        if len(a.get("kernel_shape", [0, 0])) != 2:
            raise self.refuse(node, "only convolutions over images have an int8 form")
        return {
            "stride": a.get("strides", [1, 1]),
            "padding": self.pads(node),
            "dilation": a.get("dilations", [1, 1]),
            "groups": a.get("group", 1),
        }

    def pixels(self, node: Any) -> int:
        """Height times width of the image that is a node's first input, where the model fixes them."""
        inferred = import_module("onnx.shape_inference").infer_shapes(self.model)
        for info in (*inferred.graph.value_info, *inferred.graph.input):
            if info.name == node.input[0]:
                size = [d.dim_value for d in info.type.tensor_type.shape.dim][2:]
                if len(size) == 2 and all(size):
                    return int(np.prod(size))
        raise self.refuse(node, "the model does not say how many pixels it sums")

    def refuse(self, node: Any, reason: str) -> ValueError:
        return ValueError(f"{node.name or node.output[0]} ({node.op_type}): {reason}; {WAY_OUT}")
