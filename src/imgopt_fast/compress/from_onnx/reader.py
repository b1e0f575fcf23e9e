"""Walks an ONNX graph backwards from its outputs and writes the program."""

from collections.abc import Callable
from typing import Any

from imgopt_fast.compress.from_onnx import real, stored
from imgopt_fast.compress.from_onnx.graph import PASSING, OnnxGraph
from imgopt_fast.compress.from_onnx.network import OnnxNetwork
from imgopt_fast.compress.from_onnx.products import Scale, Target
from imgopt_fast.ops.int8_graph import Int8GraphBuilder

INT32 = 6  # TensorProto.INT32


class Reader:
    """Keeps which value of the program each tensor of stored integers is."""

    def __init__(self, model: Any) -> None:
        self.graph = OnnxGraph(model)
        nodes = self.graph.graph.node
        # Floor before QuantizeLinear is how rounding half up is written; the program then computes in shifts.
        self.shift = any(n.op_type == "QuantizeLinear" and self.graph.kind(n.input[0]) == "Floor" for n in nodes)
        self.builder = Int8GraphBuilder("shift" if self.shift else "float")
        self.values: dict[str, int] = {}
        self.stacked = 0  # of a product of stacks of matrices: how many

    def network(self) -> OnnxNetwork:
        outputs, integers = [], []
        for output in self.graph.graph.output:
            exact = output.type.tensor_type.elem_type == INT32
            integers.append(exact)
            outputs.append(stored.sums(self, output.name) if exact else self._output(output.name))
        missing = [name for name in self.graph.inputs if name not in self.values]
        if missing:
            raise ValueError(f"model: no int8 layer reads its input {', '.join(missing)}")
        return OnnxNetwork(self.builder.build(outputs), self.stacked, tuple(integers))

    def _output(self, name: str) -> int:
        """A tensor that the model gives out: stored integers, or float32."""
        kind = self.graph.kind(name)
        if kind == "DequantizeLinear":
            return self.builder.dequantize(self.real(name))
        return self.stored(name, None) if kind in stored.OPERATIONS else self.compute(name, Target())

    def stored(self, name: str, scale: Scale | None) -> int:
        """The value of a tensor of stored integers; `scale` is how its reader dequantizes it."""
        if name not in self.values:
            self.values[name] = self._make(name, scale)
        value = self.values[name]
        if scale is None:
            return value
        found = self.builder.value(value)
        if found.zero_point != scale.zero_point:
            raise ValueError(f"{name}: has zero point {found.zero_point}, and is read with {scale.zero_point}")
        return value if found.scale == scale.scale else self.builder.reread(value, scale.scale)

    def _make(self, name: str, scale: Scale | None) -> int:
        if name in self.graph.inputs:
            if scale is None:
                raise ValueError(f"{name}: the model's input goes straight to its output")
            return self.declare(name, self.builder.input, scale)
        node = self.graph.maker(name)
        write = stored.OPERATIONS.get(node.op_type)
        if write is None:
            raise self.graph.refuse(node, "has no form on stored integers")
        return write(self, node, scale)

    def declare(self, name: str, declare: Callable[..., int], scale: Scale) -> int:
        """Declare the model's input `name` by that method of the builder."""
        shape = [d.dim_value for d in self.graph.inputs[name].type.tensor_type.shape.dim]
        if len(shape) == 3 and self.stacked:
            shape = [shape[1], shape[0] * shape[2]]
        if len(shape) not in (2, 4) or not shape[1]:
            raise ValueError(f"{name}: expected an input of (N, C, H, W) or (N, C) with known C, got {shape}")
        return declare(
            channels=shape[1], rank=len(shape), scale=scale.scale, zero_point=scale.zero_point, dtype=scale.dtype
        )

    def real(self, name: str) -> int:
        """The stored integers behind a float tensor: what a DequantizeLinear reads."""
        node = self.graph.maker(name)
        if node.op_type in PASSING:
            return self.real(node.input[0])
        if node.op_type != "DequantizeLinear":
            raise self.graph.refuse(node, "computes in float between int8 layers")
        return self.stored(node.input[0], self.graph.scale(node, 1, 2))

    def compute(self, name: str, target: Target) -> int:
        """The operation whose float result is the tensor `name`, with what follows it, up to `target`, fused."""
        node = self.graph.maker(name)
        write = real.OPERATIONS.get(node.op_type)
        if write is None:
            raise self.graph.refuse(node, "has no int8 form here")
        return write(self, node, target)
