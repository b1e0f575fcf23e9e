"""Which parts of a traced graph run in int8, fused as the kernels fuse them, and why the rest does not.

Convolutions and linear layers with constant weights do. Adds, concats, pools, flattens and clamps join them where all
their inputs are int8 already and something int8 reads the result: alone they would pay a conversion to save nothing.
A ReLU, ReLU6, clamp or Hardtanh goes into the operation before it, a residual add into the later of its convolutions,
so that the sum is rounded once.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from imgopt_fast.compress.quantize.fold import CONVOLUTIONS, absorbed_pad, padding_of, pair
from imgopt_fast.compress.quantize.names import key, unique
from imgopt_fast.compress.quantize.trace import arguments, aten, constant, layer_name

Kind = Literal[
    "conv2d", "linear", "add", "concat", "rescale", "max_pool2d", "avg_pool2d", "global_avg_pool2d", "flatten"
]

# Kinds that hand the values of their input on, so that scale and zero point stay.
PASSING = ("max_pool2d", "flatten")

CLAMPS: dict[Any, tuple[Any, Any]] = {
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", None),
    aten.clamp_max.default: (None, "max"),
}
RESHAPES = {
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
# Free of arithmetic, so nobody needs to be told that they are not int8.
SILENT = {
    *RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.slice.Tensor,
    aten.select.int,
    operator.getitem,
}


@dataclass(eq=False)
class Operation:
    """One int8 operation: the nodes it covers end in `output`; `inputs` are the float graph's nodes that it reads."""

    kind: Kind
    name: str
    layer: Node  # the node that was matched, before anything was fused to it
    output: Node
    inputs: list[Node]
    weight: Tensor | None = None
    bias: Tensor | None = None
    rounded_weight: Tensor | None = None  # `weight` on the int8 grid of `weight_scale`, where that is decided already
    weight_scale: Tensor | None = None
    residual: Node | None = None
    minimum: float | None = None
    maximum: float | None = None
    saturates: bool = False  # whether its scale ends at `maximum`, so that nothing else needs to clamp there
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def clamped(self) -> bool:
        return self.minimum is not None or self.maximum is not None

    @property
    def sources(self) -> list[Node]:
        """Everything that it reads, the residual last."""
        return self.inputs if self.residual is None else [*self.inputs, self.residual]


@dataclass
class Fusion:
    """What becomes int8, what stays float, and who reads what once operations have swallowed their nodes."""

    operations: dict[Node, Operation]  # by the node whose value each produces, in order of execution
    reasons: dict[Node, str]  # for every float operation that remains
    readers: dict[Node, list[Node]]  # for every node that remains; operations stand under their output

    def gives_float(self, operation: Operation) -> bool:
        """Whether only float operations read it: its exact sums are then handed on without rounding to 8 bits."""
        in_int8 = any(reader in self.operations for reader in self.readers[operation.output])
        return operation.kind in ("conv2d", "linear") and not in_int8


def fuse(graph: GraphModule, exclude: tuple[str, ...] = ()) -> Fusion:
    """Choose and fuse the int8 operations of a traced and folded graph.

    Raises ValueError when a name in `exclude` is no module of the model.
    """
    _check_exclude(graph, exclude)
    operations: dict[Node, Operation] = {}
    reasons: dict[Node, str] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        found = "excluded" if _excluded(layer_name(node), exclude) else _match(graph, node, operations)
        if isinstance(found, Operation):
            operations[node] = found
        else:
            reasons[node] = found
    _drop_unprofitable(graph, operations, reasons)
    order = {node: position for position, node in enumerate(graph.graph.nodes)}
    operations = {node: operations[node] for node in sorted(operations, key=order.__getitem__)}
    _make_names_unique(operations)
    readers = _readers(graph, operations)
    return Fusion(operations, {node: reason for node, reason in reasons.items() if node in readers}, readers)


def _match(graph: GraphModule, node: Node, made: dict[Node, Operation]) -> Operation | str:
    """The int8 operation that ends in `node`, or why there is none. Takes what it fuses out of `made`."""
    if node.target in (*CONVOLUTIONS, aten.linear.default):
        return _match_layer(graph, node, made)
    if node.target in CLAMPS:
        return _match_clamp(node, made)
    if node.target is aten.add.Tensor:
        return _match_add(node, made)
    if node.target is aten.cat.default:
        values = arguments(node)
        if _rank(node) != 4 or values["dim"] not in (1, -3):
            return "only concatenation of channels has an int8 form"
        return _passive("concat", node, list(values["tensors"]), made)
    if node.target in RESHAPES:
        return _match_flatten(node, made)
    if node.target in POOLS:
        return POOLS[node.target](node, made)
    return "no int8 form"


def _match_layer(graph: GraphModule, node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    weight, bias = constant(graph, values["weight"]), constant(graph, values["bias"])
    if weight is None or (values["bias"] is not None and bias is None):
        return "its weight is computed from the input"
    source = values["input"]
    name = layer_name(node)
    if node.target is aten.linear.default:
        if _rank(source) != 2:
            return "a linear layer over more than one axis has no int8 form"
        return Operation("linear", name, node, node, [source], weight, bias)
    padding = padding_of(node, weight)
    if padding is None or _rank(source) != 4:
        return "its padding or rank is not fixed"
    if source not in made and _shape(node)[2:] == ("1", "1"):
        return "one pixel behind a float operation: converting costs more than int8 saves"
    absorbed = absorbed_pad(source)
    if absorbed is not None:
        source, more = absorbed
        (top, bottom), (left, right) = padding
        padding = (top + more[0][0], bottom + more[0][1]), (left + more[1][0], right + more[1][1])
    attributes = {
        "stride": tuple(pair(values["stride"])),
        "padding": padding,
        "dilation": tuple(pair(values["dilation"])),
        "groups": values["groups"],
    }
    return Operation("conv2d", name, node, node, [source], weight, bias, attributes=attributes)


def _match_clamp(node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    source: Node = values["self"]
    minimum, maximum = (values[bound] if isinstance(bound, str) else bound for bound in CLAMPS[node.target])
    if isinstance(minimum, Node) or isinstance(maximum, Node):
        return "its bounds are computed from the input"
    producer = made.get(source)
    if producer is None:
        return _float_input(node)
    fusible = producer.kind in ("conv2d", "linear", "add") and not producer.clamped and len(source.users) == 1
    if fusible:
        del made[source]
    else:
        producer = Operation("rescale", layer_name(node), node, node, [source])
    producer.minimum = None if minimum is None else float(minimum)
    producer.maximum = None if maximum is None else float(maximum)
    producer.output = node
    return producer


def _match_add(node: Node, made: dict[Node, Operation]) -> Operation | str:
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node) or arguments(node)["alpha"] != 1:
        return "no int8 form"
    if left not in made or right not in made:
        return _float_input(node)
    if not _same_shape(left, right) or left is right:
        return "only tensors of one shape are added in int8"
    for source, other in ((right, left), (left, right)):
        producer = made[source]
        if producer.kind == "conv2d" and not producer.clamped and producer.residual is None and len(source.users) == 1:
            del made[source]
            producer.residual, producer.output = other, node
            return producer
    return Operation("add", layer_name(node) or "add", node, node, [left, right])


def _match_flatten(node: Node, made: dict[Node, Operation]) -> Operation | str:
    source: Node = arguments(node)["self"]
    if _rank(node) != 2 or _rank(source) != 4 or _shape(node)[0] != _shape(source)[0]:
        return "no int8 form"
    return _passive("flatten", node, [source], made)


def _match_max_pool(node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    if values["ceil_mode"] or pair(values["dilation"]) != [1, 1] or _rank(node) != 4:
        return "a max pool with ceil_mode or dilation has no int8 form"
    kernel = tuple(pair(values["kernel_size"]))
    stride = tuple(pair(values["stride"])) if values["stride"] else kernel
    attributes = {"kernel_size": kernel, "stride": stride, "padding": tuple(pair(values["padding"]))}
    return _passive("max_pool2d", node, [values["self"]], made, attributes)


def _match_avg_pool(node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    padding = tuple(pair(values["padding"]))
    if values["ceil_mode"] or values["divisor_override"] or _rank(node) != 4:
        return "an average pool with ceil_mode or divisor_override has no int8 form"
    if padding != (0, 0) and not values["count_include_pad"]:
        return "an average pool that leaves its padding out has no int8 form"
    kernel = tuple(pair(values["kernel_size"]))
    stride = tuple(pair(values["stride"])) if values["stride"] else kernel
    return _passive(
        "avg_pool2d", node, [values["self"]], made, {"kernel_size": kernel, "stride": stride, "padding": padding}
    )


def _match_adaptive_pool(node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    if pair(values["output_size"]) != [1, 1] or _rank(node) != 4:
        return "an adaptive pool to more than one pixel has no int8 form"
    return _passive("global_avg_pool2d", node, [values["self"]], made, {"flat": False})


def _match_mean(node: Node, made: dict[Node, Operation]) -> Operation | str:
    values = arguments(node)
    axes = sorted(axis % 4 for axis in values["dim"] or ())
    if _rank(values["self"]) != 4 or axes != [2, 3] or values["dtype"] is not None:
        return "only the mean over an image has an int8 form"
    return _passive("global_avg_pool2d", node, [values["self"]], made, {"flat": not values["keepdim"]})


POOLS: dict[Any, Callable[[Node, dict[Node, Operation]], Operation | str]] = {
    aten.max_pool2d.default: _match_max_pool,
    aten.avg_pool2d.default: _match_avg_pool,
    aten.adaptive_avg_pool2d.default: _match_adaptive_pool,
    aten.mean.dim: _match_mean,
}


def _passive(
    kind: Kind, node: Node, inputs: list[Node], made: dict[Node, Operation], attributes: dict[str, Any] | None = None
) -> Operation | str:
    """An operation that is worth int8 only between int8 operations."""
    if any(source not in made for source in inputs):
        return _float_input(node)
    return Operation(kind, layer_name(node) or kind, node, node, inputs, attributes=attributes or {})


def _readers(graph: GraphModule, operations: dict[Node, Operation]) -> dict[Node, list[Node]]:
    found: dict[Node, list[Node]] = {}
    pending = [node for node in graph.graph.nodes if node.op in ("output", "placeholder")]
    while pending:
        node = pending.pop()
        operation = operations.get(node)
        for source in node.all_input_nodes if operation is None else operation.sources:
            if source not in found:
                found[source] = []
                pending.append(source)
            found[source].append(node)
    return found


def _drop_unprofitable(graph: GraphModule, operations: dict[Node, Operation], reasons: dict[Node, str]) -> None:
    """Give back to float what would be converted without being computed faster."""
    for node in sorted(operations, key=list(graph.graph.nodes).index, reverse=True):
        operation = operations[node]
        read_in_int8 = any(node in other.sources for other in operations.values())
        if operation.kind not in ("conv2d", "linear") and not read_in_int8:
            reasons[node] = reasons[operation.layer] = "nothing that runs in int8 reads it"
            del operations[node]


def _make_names_unique(operations: dict[Node, Operation]) -> None:
    first: dict[str, Operation] = {}
    for operation in operations.values():
        operation.name = operation.name or operation.kind
        first.setdefault(key(operation.name), operation)
    taken = set(first)  # a layer that is used twice, or that only differs in its dots, leaves others their names
    for operation in operations.values():
        if first[key(operation.name)] is not operation:
            operation.name = unique(operation.name, taken)


def _check_exclude(graph: GraphModule, exclude: tuple[str, ...]) -> None:
    known = {layer_name(node) for node in graph.graph.nodes if node.op == "call_function"}
    for name in exclude:
        if not any(_excluded(layer, (name,)) for layer in known):
            raise ValueError(f"exclude: the model has no module {name!r}; it has {', '.join(sorted(known - {''}))}")


def _excluded(layer: str, exclude: tuple[str, ...]) -> bool:
    return any(layer == name or layer.startswith(f"{name}.") for name in exclude)


def _float_input(node: Node) -> str:
    return "its input is float"


def _same_shape(left: Node, right: Node) -> bool:
    """Whether two tensors have one shape for all image sizes that the model takes.

    A strided convolution and a pool beside it give sizes that are equal where the model runs, as expressions they
    differ; only a size of one could also be broadcast.
    """
    if _rank(left) != _rank(right):
        return False
    pairs = zip(left.meta["val"].shape, right.meta["val"].shape, strict=True)
    return all(str(a) == str(b) or _at_calibration(a) == _at_calibration(b) != 1 for a, b in pairs)


def _at_calibration(size: int | torch.SymInt) -> Any:
    """A size of the traced batch, whose images are as large as those of the calibration."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _shape(node: Any) -> tuple[str, ...]:
    """Sizes as text: symbolic sizes compare equal when they are the same expression."""
    return tuple(str(size) for size in node.meta["val"].shape)


def _rank(node: Any) -> int:
    return len(node.meta["val"].shape) if isinstance(node, Node) else 0
