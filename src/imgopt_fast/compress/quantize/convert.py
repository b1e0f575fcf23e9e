"""From a float graph, its int8 operations and their scales to the network that runs them.

The int8 operations are gathered into as few segments as their dependencies allow: an operation's level counts the
float islands behind it, and all int8 operations of one level are one segment, one call. Between the segments the float
nodes keep their ATen operations.
"""

import operator
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from imgopt_fast.compress.quantize.calibrate import Scale
from imgopt_fast.compress.quantize.fuse import PASSING, Operation
from imgopt_fast.compress.quantize.names import key
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.weights import quantize_weight
from imgopt_fast.nn.int8 import Int8Conv2d, Int8Linear, Requantize
from imgopt_fast.nn.int8_segment import Int8Segment, Step


def convert(plan: Plan, attributes: nn.Module | None = None) -> GraphModule:
    """The network, on the CPU, as a graph module of `Int8Segment`s and float operations.

    `attributes`: where the parameters of the float parts are, by their names in the plan's graph (default: there).
    Raises ValueError, naming the layer, where sums could overflow.
    """
    root, target = nn.Module(), Graph()
    floats: dict[Node, Node] = {}  # where the float value of a node is in the new graph
    stored: dict[Node, Node] = {}  # where its quantized value is
    levels = _levels(plan)
    ordered = sorted(plan.order, key=levels.__getitem__)  # stable: order remains within a level
    for level, nodes in groupby(ordered, key=levels.__getitem__):
        if level % 2:
            segment = _SegmentWriter(plan, {node: plan.fusion.operations[node] for node in nodes})
            segment.call(f"segment_{level // 2}", root, target, floats, stored)
            continue
        for node in nodes:
            if node.op == "get_attr":
                copy_attribute(attributes or plan.graph, root, str(node.target), trainable=False)
            floats[node] = target.node_copy(node, floats.__getitem__)
    target.node_copy(plan.output, floats.__getitem__)
    return GraphModule(root, target).eval()


def copy_attribute(source: nn.Module, root: nn.Module, path: str, *, trainable: bool) -> None:
    """Put the parameter or buffer `path` of `source` at the same place under `root`, as a buffer unless `trainable`."""
    value = operator.attrgetter(path)(source)
    *folders, leaf = path.split(".")
    for folder in folders:
        if not hasattr(root, folder):
            root.add_module(folder, nn.Module())
        root = root.get_submodule(folder)
    if trainable and isinstance(value, nn.Parameter):
        root.register_parameter(leaf, nn.Parameter(value.detach().clone()))
    elif isinstance(value, Tensor):
        root.register_buffer(leaf, value.detach().clone())
    else:
        setattr(root, leaf, value)


def _levels(plan: Plan) -> dict[Node, int]:
    """Even for float nodes, odd for int8 operations, never falling along a dependency."""
    levels: dict[Node, int] = {}
    for node in plan.order:
        level = max((levels[source] for source in plan.sources(node)), default=0)
        levels[node] = level + (level % 2 != (node in plan.fusion.operations))
    return levels


def _maximum(operation: Operation) -> float | None:
    return None if operation.saturates else operation.maximum


class _SegmentWriter:
    """Writes the steps of one segment."""

    def __init__(self, plan: Plan, operations: dict[Node, Operation]) -> None:
        self.plan, self.operations = plan, operations
        self.requantize: Requantize = "shift" if plan.config.power_of_two else "float"
        self.steps: list[Step] = []
        self.positions: dict[Node, int] = {}
        self.inputs: list[Node] = []
        self.layers: dict[str, nn.Module] = {}
        self.step_scales: dict[str, Scale] = {}

    def call(
        self, name: str, root: nn.Module, target: Graph, floats: dict[Node, Node], stored: dict[Node, Node]
    ) -> None:
        """Write the steps, add the segment to `root` and its call to `target`, and record where the results are."""
        for operation in self.operations.values():
            self._write(operation)
        outputs: list[int] = []
        results: list[tuple[Node, dict[Node, Node]]] = []
        for node, operation in self.operations.items():
            readers = self.plan.fusion.readers[node]
            if any(reader in self.plan.fusion.operations and reader not in self.operations for reader in readers):
                outputs.append(self.positions[node])
                results.append((node, stored))
            if any(reader not in self.plan.fusion.operations for reader in readers):
                position = self.positions[node]
                if not self.plan.fusion.gives_float(operation):
                    position = self._step("dequantize", f"{operation.name}_float", [node])
                outputs.append(position)
                results.append((node, floats))
        segment = Int8Segment(self.steps, outputs, self.layers, self.step_scales, self.requantize)
        root.add_module(name, segment)
        where = {node: stored[node] if node in self.plan.fusion.operations else floats[node] for node in self.inputs}
        call = target.call_module(name, tuple(where[node] for node in self.inputs))
        for index, (node, place) in enumerate(results):
            place[node] = target.call_function(operator.getitem, (call, index))

    def _write(self, operation: Operation) -> None:
        attributes = dict(operation.attributes)
        if operation.kind in ("conv2d", "linear"):
            self.layers[key(operation.name)] = self._layer(operation)
            attributes = {}
        elif operation.kind == "add":
            attributes = {"output_min": operation.minimum, "output_max": _maximum(operation)}
        flat = attributes.pop("flat", False)
        if operation.kind not in PASSING and operation.weight is None:
            self.step_scales[key(operation.name)] = self.plan.scales[operation.output]
        position = self._step(operation.kind, operation.name, operation.inputs, operation.residual, attributes)
        self.positions[operation.output] = position
        if flat:
            self.positions[operation.output] = self._step("flatten", f"{operation.name}_flat", [operation.output])

    def _step(
        self,
        kind: str,
        name: str,
        sources: list[Node],
        residual: Node | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> int:
        inputs = tuple(self._position(source) for source in sources)
        added = None if residual is None else self._position(residual)
        self.steps.append(Step(kind, key(name), inputs, added, attributes or {}))
        return len(self.steps) - 1

    def _position(self, node: Node) -> int:
        """The value of `node` in this segment; one that comes from outside becomes an input."""
        if node not in self.positions:
            name = f"input_{len(self.inputs)}"
            value = node.meta["val"]
            self.inputs.append(node)
            self.step_scales[name] = self.plan.scale_of(node)
            attributes = {"channels": int(value.shape[1]), "rank": value.ndim}
            kind = "input" if node in self.plan.fusion.operations else "quantize"
            self.positions[node] = self._step(kind, name, [], None, attributes)
        return self.positions[node]

    def _layer(self, operation: Operation) -> nn.Module:
        source = self.plan.scale_of(operation.inputs[0])
        assert operation.weight is not None
        given = operation.weight if operation.rounded_weight is None else operation.rounded_weight
        weight, weight_scale = quantize_weight(
            given, operation.bias, source.scale, self.plan.config, operation.weight_scale
        )
        bias = None if operation.bias is None else operation.bias.cpu()
        result = None if self.plan.fusion.gives_float(operation) else self.plan.scales[operation.output]
        make: Any = Int8Conv2d if operation.kind == "conv2d" else Int8Linear
        try:
            layer: nn.Module = make(
                weight.cpu(),
                weight_scale.cpu(),
                bias,
                input_scale=source.scale,
                input_zero_point=source.zero_point,
                output_scale=None if result is None else result.scale,
                output_zero_point=0 if result is None else result.zero_point,
                output_min=operation.minimum,
                output_max=_maximum(operation),
                requantize=self.requantize,
                **operation.attributes,
            )
        except ValueError as refusal:
            raise ValueError(
                f"{operation.name}: {refusal}; Int8Config(exclude=({operation.name!r},)) keeps the layer float"
            ) from refusal
        return layer
