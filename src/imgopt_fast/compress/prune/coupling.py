"""Which channels of a network can only be removed together, from its traced graph.

Every tensor of the graph carries a list of channels along its second axis. A convolution or linear layer makes new
ones and reads others; a batch norm, an activation or a pool hands them on; an addition ties those of its operands
together, as the residual connections of a ResNet do for a whole stage; a convolution in groups ties the channels that
have the same place in their group, so that its groups stay alike; flattening repeats a channel for each of its pixels.
What remains are groups: the slices of parameters that one channel owns, wherever it goes.

Channels that meet something this analysis does not know are fixed, with the reason; so are those of the network's
input and output.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from imgopt_fast.compress.quantize.fold import BATCH_NORMS, CONVOLUTIONS
from imgopt_fast.compress.quantize.fuse import RESHAPES
from imgopt_fast.compress.quantize.trace import arguments, aten, layer_name, trace

ARITHMETIC = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
# One channel in, the same channel out.
PASSING = {
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "silu", "hardswish", "hardsigmoid", "sigmoid",
    "tanh", "gelu", "elu", "leaky_relu", "mish", "softplus", "abs", "neg", "pow", "to", "_to_copy", "max_pool2d",
    "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
}  # fmt: skip
LAYERS = (nn.Conv2d, nn.Linear)
# One channel in, the same channel out, with a number or more of its own.
PER_CHANNEL = {*BATCH_NORMS, aten.instance_norm.default, aten.prelu.default}


class Slice(NamedTuple):
    """One position along one axis of a parameter or buffer."""

    tensor: str
    axis: int
    at: int


@dataclass
class ChannelGroup:
    """What is removed together: one channel of each of `layers`, and all that batch norms and readers hold of it."""

    layers: tuple[str, ...]
    slices: list[Slice]

    @property
    def made(self) -> list[Slice]:
        """The slices along the first axis of the layers' weights: what makes the channel."""
        return [s for s in self.slices if s.axis == 0 and s.tensor in {f"{name}.weight" for name in self.layers}]


@dataclass
class _Obstacle:
    reason: str
    silent: bool  # asked for by the user or the network's interface


@dataclass
class _Coupling:
    """Channels as numbers in a union-find forest, and what is known of each."""

    parent: list[int] = field(default_factory=list)
    slices: dict[int, list[Slice]] = field(default_factory=dict)
    makers: dict[int, set[str]] = field(default_factory=dict)
    obstacles: dict[int, list[_Obstacle]] = field(default_factory=dict)

    def new(self, count: int) -> list[int]:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return self.parent[first:]

    def find(self, channel: int) -> int:
        while self.parent[channel] != channel:
            self.parent[channel] = self.parent[self.parent[channel]]
            channel = self.parent[channel]
        return channel

    def join(self, some: list[int], others: list[int]) -> None:
        for a, b in zip(some, others, strict=True):
            a, b = sorted((self.find(a), self.find(b)))
            if a == b:
                continue
            self.parent[b] = a
            self.slices.setdefault(a, []).extend(self.slices.pop(b, []))
            self.makers.setdefault(a, set()).update(self.makers.pop(b, set()))
            self.obstacles.setdefault(a, []).extend(self.obstacles.pop(b, []))

    def own(self, channels: list[int], tensor: str, axis: int) -> None:
        for index, channel in enumerate(channels):
            self.slices.setdefault(self.find(channel), []).append(Slice(tensor, axis, index))

    def make(self, channels: list[int], layer: str) -> None:
        for channel in channels:
            self.makers.setdefault(self.find(channel), set()).add(layer)

    def fix(self, channels: list[int] | None, reason: str, *, silent: bool = False) -> None:
        for channel in channels or []:
            self.obstacles.setdefault(self.find(channel), []).append(_Obstacle(reason, silent))


def channel_groups(model: nn.Module, images: Tensor, exclude: tuple[str, ...] = ()) -> list[ChannelGroup]:
    """The groups of channels of `model` that can be removed, in the order of the first layer that makes them.

    Raises ValueError, naming every layer whose channels cannot be removed, why, and how to leave it out.
    """
    walk = _Walk(model, exclude)
    graph, _ = trace(model, images)
    for node in graph.graph.nodes:
        walk.visit(node)
    return walk.groups()


class _Walk:
    def __init__(self, model: nn.Module, exclude: tuple[str, ...]) -> None:
        self.model, self.exclude = model, exclude
        self.known = dict(model.named_parameters()) | dict(model.named_buffers())
        self.coupling = _Coupling()
        self.channels: dict[Node, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}  # of a weight that is used more than once

    def visit(self, node: Node) -> None:
        if node.op == "output":
            for source in node.all_input_nodes:
                self.coupling.fix(self.channels.get(source), "the network gives them out", silent=True)
        elif node.op == "placeholder":
            self._fixed(node, "they are the network's input", silent=True)
        elif node.op == "call_function" and any(source in self.channels for source in node.all_input_nodes):
            if isinstance(node.meta.get("val"), Tensor):
                self._call(node)
            elif node.target is not aten.sym_size.int:
                self._unknown(node)

    def groups(self) -> list[ChannelGroup]:
        coupling = self.coupling
        refused: dict[str, str] = {}
        found = []
        for channel in sorted(coupling.makers):
            layers, obstacles = sorted(coupling.makers[channel]), coupling.obstacles.get(channel, [])
            if not obstacles:
                found.append(ChannelGroup(tuple(layers), coupling.slices[channel]))
            elif not any(obstacle.silent for obstacle in obstacles):
                refused |= dict.fromkeys(layers, obstacles[0].reason)
        if refused:
            lines = [f"{layer}: its output channels cannot be removed: {reason}" for layer, reason in refused.items()]
            raise ValueError("\n".join([*lines, f"PruneConfig(exclude={tuple(refused)}) leaves them as they are"]))
        return found

    def _call(self, node: Node) -> None:
        first = node.all_input_nodes[0]
        if node.target in CONVOLUTIONS or node.target is aten.linear.default:
            self._layer(node)
        elif node.target in PER_CHANNEL:
            self._per_channel(node)
        elif node.target in ARITHMETIC:
            self._arithmetic(node)
        elif node.target is aten.cat.default and arguments(node)["dim"] in (1, 1 - _rank(node)):
            self.channels[node] = [channel for part in arguments(node)["tensors"] for channel in self.channels[part]]
        elif node.target in RESHAPES:
            self._reshape(node, first)
        elif first in self.channels and (self._passes(node) or self._is_spatial(node)):
            self.channels[node] = self.channels[first]
        else:
            self._unknown(node)

    def _layer(self, node: Node) -> None:
        values = arguments(node)
        source, weight, groups = values["input"], str(values["weight"].target), values.get("groups", 1)
        layer, read = weight.rpartition(".")[0], self.channels.get(source, [])
        if not self._is_layer(layer):
            self._unknown(node)
        elif any(layer == name or layer.startswith(name + ".") for name in self.exclude):
            self._keep(node, read, layer, "it is excluded", silent=True)
        elif node.target is aten.linear.default and _rank(node) != 2:
            self._keep(node, read, layer, f"{layer} is a linear layer over more than one axis")
        else:
            self._make(node, read, weight, values["bias"], groups)

    def _make(self, node: Node, read: list[int], weight: str, bias: Node | None, groups: int) -> None:
        """The channels that a layer makes of those it reads; a layer that is used twice makes the same."""
        coupling, again = self.coupling, weight in self.outputs
        if not again:
            self.outputs[weight] = coupling.new(_channel_count(node))
            coupling.own(self.outputs[weight], weight, 0)
            coupling.make(self.outputs[weight], weight.rpartition(".")[0])
            if bias is not None:
                coupling.own(self.outputs[weight], str(bias.target), 0)
        made = self.outputs[weight]
        self.channels[node] = made
        if groups > 1 and groups == len(read):  # depthwise
            coupling.join([channel for channel in read for _ in range(len(made) // len(read))], made)
            return
        for channels in (read, made):
            size = len(channels) // groups
            coupling.join(channels[size:], channels[:-size])  # each with its like in the group before
        if again:
            self._tie_readers(weight, read)
        else:
            coupling.own(read[: len(read) // groups], weight, 1)

    def _tie_readers(self, weight: str, read: list[int]) -> None:
        first = {s.at: channel for channel, owned in self.coupling.slices.items() for s in owned
                 if s.tensor == weight and s.axis == 1}  # fmt: skip
        self.coupling.join([first[index] for index in range(len(first))], read[: len(first)])

    def _is_layer(self, layer: str) -> bool:
        """Whether `layer` owns its weight as a plain parameter, so that a slice of it can be taken away."""
        try:
            return type(self.model.get_submodule(layer)) in LAYERS and f"{layer}.weight" in self.known
        except AttributeError:
            return False

    def _keep(self, node: Node, read: list[int], layer: str, reason: str, *, silent: bool = False) -> None:
        self.coupling.fix(read, reason, silent=silent)
        self._fixed(node, reason, silent=silent)
        self.coupling.make(self.channels[node], layer)

    def _per_channel(self, node: Node) -> None:
        channels, tensors = self.channels.get(node.all_input_nodes[0]), node.all_input_nodes[1:]
        if channels is None or any(str(source.target) not in self.known for source in tensors):
            self._unknown(node)
            return
        for source in tensors:
            if len(self.known[str(source.target)]) > 1:  # nn.PReLU may have one number for all channels
                self.coupling.own(channels, str(source.target), 0)
        self.channels[node] = channels

    def _arithmetic(self, node: Node) -> None:
        operands = [source for source in node.args[:2] if isinstance(source, Node)]
        carried = [source for source in operands if source in self.channels]
        wide = [source for source in carried if len(self.channels[source]) == _channel_count(node)]
        rest = [source for source in operands if source not in carried]
        scales = [(str(source.target), axis) for source in rest if (axis := _axis_of_channels(source, node)) >= 0]
        same_rank = all(_rank(source) == _rank(node) for source in carried)
        if not wide or not same_rank or any(name not in self.known for name, _ in scales):
            self._unknown(node)
            return
        channels = self.channels[wide[0]]
        for source in wide[1:]:
            self.coupling.join(channels, self.channels[source])
        for name, axis in scales:
            self.coupling.own(channels, name, axis)
        self.channels[node] = channels

    def _reshape(self, node: Node, source: Node) -> None:
        channels, made = self.channels.get(source, []), _channel_count(node)
        flattens = _rank(node) == 2 and _rank(source) == 4
        if not channels or not made or not flattens or made % len(channels):
            self._unknown(node)
            return
        self.channels[node] = [channel for channel in channels for _ in range(made // len(channels))]

    def _passes(self, node: Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name[6:] in PASSING

    def _is_spatial(self, node: Node) -> bool:
        """Whether it works on the pixels of a channel: a mean over them, or padding around them."""
        if node.target is aten.mean.dim and _rank(node.all_input_nodes[0]) == 4:
            return sorted(axis % 4 for axis in arguments(node)["dim"] or (0,)) == [2, 3]
        return node.target in (aten.pad.default, aten.constant_pad_nd.default) and len(arguments(node)["pad"]) <= 4

    def _unknown(self, node: Node) -> None:
        where = layer_name(node) or "forward"
        reason = f"they go into {str(node.target).removesuffix('.default')} in {where}"
        for source in node.all_input_nodes:
            self.coupling.fix(self.channels.get(source), reason)
        if isinstance(node.meta.get("val"), Tensor) and any(s in self.channels for s in node.all_input_nodes):
            self._fixed(node, reason)

    def _fixed(self, node: Node, reason: str, *, silent: bool = False) -> None:
        self.channels[node] = self.coupling.new(_channel_count(node))
        self.coupling.fix(self.channels[node], reason, silent=silent)


def _rank(node: Node) -> int:
    return len(node.meta["val"].shape)


def _axis_of_channels(constant: Node, result: Node) -> int:
    """The axis of a constant operand that meets the channels of the result; -1 where it has none, or one for all."""
    shape = constant.meta["val"].shape
    axis = len(shape) - (_rank(result) - 1)  # broadcasting counts from the right
    return axis if axis >= 0 and shape[axis] != 1 else -1


def _channel_count(node: Node) -> int:
    """Size of the second axis, 0 where there is none; what depends on the image size as the example has it."""
    shape = node.meta["val"].shape
    size = shape[1] if len(shape) > 1 else 0
    return int(size) if isinstance(size, int) else int(size.node.hint)
