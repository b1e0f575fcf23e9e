"""A network as every exporter sees it: numbered values, and the layers that make them, in order of execution.

The description is written down while the network computes a few images, step by step: that gives every value its shape
and, at no further cost, the tensors that an engine's answers are compared with.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node, map_arg

from imgopt_fast.compress.quantize import Int8Model, QatModel
from imgopt_fast.compress.quantize.fold import fold
from imgopt_fast.compress.quantize.trace import arguments, layer_name, trace
from imgopt_fast.nn import Int8Segment, Step
from imgopt_fast.ops.int8_conv2d import PackedInt8Weight
from imgopt_fast.ops.int8_conv2d.reference import INTEGER_RANGE, clamp_range

FLOAT = "float"  # the kind of a layer that is an ATen operation on float values


@dataclass(frozen=True)
class Value:
    """What flows between layers; real = (stored - zero_point) * scale where it is uint8."""

    name: str
    shape: tuple[int, ...]  # with the batch of the sample
    dtype: torch.dtype
    scale: float = 1.0
    zero_point: int = 0

    @property
    def quantized(self) -> bool:
        return self.dtype in INTEGER_RANGE


class Use(NamedTuple):
    """A value among the arguments of an ATen operation."""

    value: int


@dataclass(frozen=True, eq=False)
class Layer:
    """A step of an int8 segment (kinds as in `nn.int8_segment.Step`), or one ATen operation (FLOAT)."""

    kind: str
    name: str
    inputs: tuple[int, ...]
    output: int
    residual: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)  # of an ATen operation: its arguments, values as `Use`
    weights: PackedInt8Weight | None = None
    operation: Any = None


@dataclass(frozen=True, eq=False)
class Network:
    """Layers in order of execution. `tensors` holds what each value is for `images`, bit for bit."""

    values: list[Value]
    layers: list[Layer]
    input: int
    outputs: tuple[int, ...]
    constants: frozenset[int]  # values that are parameters of float layers
    shift: bool  # requantized by shifts: every scale is a power of two
    images: Tensor
    tensors: list[Tensor]

    @property
    def float_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == FLOAT]

    @property
    def rounds(self) -> bool:
        """Whether values are rounded to integers inside."""
        return any(value.quantized for value in self.values)

    def bounds(self, layer: Layer) -> tuple[float, float]:
        """Between what the result of `layer` is clamped, in steps of its scale, the zero point not added yet."""
        out = self.values[layer.output]
        clamp = (layer.attributes.get("output_min"), layer.attributes.get("output_max"))
        return clamp_range(out.dtype, out.scale, out.zero_point, *clamp)

    def steps(self, layer: Layer) -> tuple[int, int]:
        """The stored values that `layer` may give out: those of its dtype, narrowed by its clamp."""
        out = self.values[layer.output]
        low, high = self.bounds(layer)
        return round(low) + out.zero_point, round(high) + out.zero_point

    def clamps(self, layer: Layer) -> bool:
        """Whether the layer's clamp does more than its dtype's range does anyway."""
        out = self.values[layer.output]
        if not out.quantized:
            return any(layer.attributes.get(name) is not None for name in ("output_min", "output_max"))
        return self.steps(layer) != INTEGER_RANGE[out.dtype]


def describe(model: nn.Module, images: Tensor) -> Network:
    """The description of an `Int8Model`, or of a float model as torch.export sees it.

    `images` are float32 (N, C, H, W) as the model takes them; N of 2 or more leaves the batch size free. Raises
    ValueError for a model that cannot be traced, and for one still in quantization-aware training.
    """
    if isinstance(model, QatModel):
        raise ValueError("model: is in quantization-aware training; export what its convert() returns")
    model = copy.deepcopy(model).cpu().eval()
    images = images.detach().float().cpu()
    if isinstance(model, Int8Model):
        graph = model.network
    else:
        graph, _ = trace(model, images)
        fold(graph)
    walk = _Walk(graph)
    with torch.no_grad():
        walk.run(images)
    return walk.network(images)


class _Walk(Interpreter):
    """Runs a graph module of int8 segments and ATen operations, and writes down what it meets."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.graph_module = graph
        self.values: list[Value] = []
        self.layers: list[Layer] = []
        self.tensors: list[Tensor] = []
        self.constants: set[int] = set()
        self.ids: dict[Node, Any] = {}  # a value's number, or a tuple of them
        self.outputs: tuple[int, ...] = ()
        self.shift = False

    def network(self, images: Tensor) -> Network:
        source = next(node for node in self.graph_module.graph.nodes if node.op == "placeholder")
        constants = frozenset(self.constants)
        return Network(
            self.values, self.layers, self.ids[source], self.outputs, constants, self.shift, images, self.tensors
        )

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            self.outputs = tuple(self.ids[node] for node in n.all_input_nodes)
            return super().run_node(n)
        if n.op == "call_module":
            return self._run_segment(n)
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            self._float_layer(n, result)
        elif n.op == "call_function" and isinstance(n.args[0], Node) and isinstance(self.ids.get(n.args[0]), tuple):
            self.ids[n] = self.ids[n.args[0]][n.args[1]]
        elif isinstance(result, Tensor):
            self.ids[n] = self._new(n.name, result)
            if n.op == "get_attr":
                self.constants.add(self.ids[n])
        return result

    def _new(self, name: str, tensor: Tensor, scale: float = 1.0, zero_point: int = 0) -> int:
        taken = {value.name for value in self.values}
        unique = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        self.values.append(Value(unique, tuple(tensor.shape), tensor.dtype, scale, zero_point))
        self.tensors.append(tensor.detach().contiguous())
        return len(self.values) - 1

    def _float_layer(self, node: Node, result: Any) -> None:
        if not isinstance(result, (Tensor, tuple, list)):
            return  # a size: shapes are known
        parts = [result] if isinstance(result, Tensor) else list(result)
        made = [self._new(node.name, part) for part in parts]
        self.ids[node] = made[0] if isinstance(result, Tensor) else tuple(made)
        values = map_arg(arguments(node), lambda source: Use(self.ids[source]) if source in self.ids else None)
        inputs = tuple(self.ids[source] for source in node.all_input_nodes if isinstance(self.ids.get(source), int))
        name = layer_name(node) or node.name
        self.layers.append(Layer(FLOAT, name, inputs, made[0], attributes=dict(values), operation=node.target))

    def _run_segment(self, node: Node) -> tuple[Tensor, ...]:
        segment = self.graph_module.get_submodule(str(node.target))
        assert isinstance(segment, Int8Segment)
        self.shift = self.shift or segment.requantize == "shift"
        given = iter(node.all_input_nodes)
        positions: dict[int, int] = {}
        pending = []
        for position, step in enumerate(segment.steps):
            if step.kind == "input":
                positions[position] = self.ids[next(given)]
            else:
                source = next(given) if step.kind == "quantize" else None
                pending.append((position, None if source is None else self.ids[source]))
        waiting = iter(pending)

        def run(step: Step, compute: Callable[[], Tensor], held: int) -> Tensor:
            position, source = next(waiting)
            result = compute()
            positions[position] = self._int8_layer(segment, step, position, source, positions, result)
            return result

        segment.run_stepwise([self.env[source] for source in node.args if isinstance(source, Node)], run)
        self.ids[node] = tuple(positions[position] for position in segment.outputs)
        return tuple(self.tensors[value] for value in self.ids[node])

    def _int8_layer(
        self,
        segment: Int8Segment,
        step: Step,
        position: int,
        source: int | None,
        positions: dict[int, int],
        result: Tensor,
    ) -> int:
        quantization = segment.quantization(position) if result.dtype in INTEGER_RANGE else (1.0, 0)
        output = self._new(step.name if source is None else f"{step.name}_quantized", result, *quantization)
        attributes, weights = dict(step.attributes), None
        if step.kind in ("conv2d", "linear"):
            layer: Any = segment.get_submodule(step.name)
            weights = layer.packed()
            attributes |= {"output_min": layer.output_min, "output_max": layer.output_max}
            if step.kind == "conv2d":
                attributes |= {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        inputs = tuple(positions[i] for i in step.inputs) if source is None else (source,)
        residual = None if step.residual is None else positions[step.residual]
        self.layers.append(Layer(step.kind, step.name, inputs, output, residual, attributes, weights))
        return output
