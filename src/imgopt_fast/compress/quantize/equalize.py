"""Cross-layer equalization: channels far below the range of their tensor are lifted, or they keep no bits in int8.

Between two layers with nothing but a ReLU or a pool in between, channel c may be divided by s[c] in the first and
multiplied by s[c] in the second (Nagel et al. 2019). Weights have a scale per output channel here, so what there is to
gain is the activation between the layers: s follows from its channel ranges. A depthwise second layer absorbs any s in
its scales; a dense one shares a scale over its input channels, so there s balances activation and weight, each getting
half of the unevenness (Xiao et al. 2023).

Making all channels equal, as the papers do, is wrong for channels that mean something: those that the calibration
images leave nearly idle are the ones that other images excite, and they would then saturate. On EfficientNet-Lite0 with
its published ImageNet weights it cost 8 dB and 3 points; lifting to a sixteenth of the range costs neither.
"""

from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from imgopt_fast.compress.quantize.calibrate import watch
from imgopt_fast.compress.quantize.fuse import Fusion, Operation
from imgopt_fast.compress.quantize.trace import add_constant

POOLS = ("max_pool2d", "avg_pool2d", "global_avg_pool2d", "flatten")
HEADROOM = 16.0  # a channel is lifted to this part of its tensor's range: 4 of the 8 bits, and room for other images
LIMIT = 64.0  # a channel moves at most by this factor: beyond it a rarely active channel would set the scale for all


@torch.no_grad()
def equalize(graph: GraphModule, fusion: Fusion, images: Tensor) -> None:
    """Equalize every pair of layers of `fusion`, in place, in it and in `graph`; the ranges are those on `images`.

    A clamp from above, as in ReLU6, stays exact on `images` and far beyond: no channel is lifted near it.
    """
    pairs = [(first, second) for first in fusion.operations.values() if (second := _partner(first, fusion))]
    # One pass serves all: moving a channel between two layers changes nothing but the tensor between them.
    ranges = _channel_ranges(graph, [first.output for first, _ in pairs], images)
    for first, second in pairs:
        assert first.weight is not None
        assert second.weight is not None
        factor = _factors(ranges[first.output], first, second)
        first.weight = first.weight / factor.view(-1, *[1] * (first.weight.ndim - 1))
        first.bias = None if first.bias is None else first.bias / factor
        second.weight = second.weight * _as_input(factor, second)
        for operation in (first, second):
            _store(graph, operation)
    graph.recompile()


def _partner(first: Operation, fusion: Fusion) -> Operation | None:
    """The layer that alone reads `first`, through nothing but operations that commute with scaling a channel."""
    if first.weight is None or first.residual is not None or (first.clamped and first.minimum != 0):
        return None
    node = first.output
    while True:
        readers = fusion.readers[node]
        reader = fusion.operations.get(readers[0]) if len(readers) == 1 else None
        if reader is None or reader.residual is node:
            return None
        if reader.weight is not None:
            groups = reader.attributes.get("groups", 1)
            return reader if reader.weight.shape[1] * groups == len(first.weight) else None
        if reader.kind not in POOLS:
            return None
        node = reader.output


def _channel_ranges(graph: GraphModule, nodes: list[Node], images: Tensor) -> dict[Node, Tensor]:
    """Largest magnitude of every channel of `nodes`."""
    found: dict[Node, Tensor] = {}

    def note(node: Node, values: Tensor) -> None:
        found[node] = values.abs().amax([axis for axis in range(values.ndim) if axis != 1])

    watch(graph, images, {node: partial(note, node) for node in nodes})
    return found


def _factors(ranges: Tensor, first: Operation, second: Operation) -> Tensor:
    """What to divide each channel by."""
    assert second.weight is not None
    tiny = torch.finfo(ranges.dtype).tiny
    wanted = HEADROOM * ranges
    factor = (wanted / ranges.max().clamp(min=tiny)).clamp(max=1)
    groups = second.attributes.get("groups", 1)
    if groups != len(ranges):
        weight = _per_input(second.weight, groups)
        factor = torch.sqrt(factor / (weight / weight.max().clamp(min=tiny)).clamp(min=1e-6)).clamp(max=1)
    factor = factor.clamp(min=1 / LIMIT)
    if first.maximum is not None:
        factor = torch.maximum(factor, (wanted / first.maximum).clamp(max=1))
    return torch.where(ranges == 0, torch.ones_like(factor), factor)


def _per_input(weight: Tensor, groups: int) -> Tensor:
    """Largest magnitude among the weights that read each input channel."""
    if weight.ndim == 2:
        return weight.abs().amax(0)
    return torch.flatten(weight.abs().amax((2, 3)).reshape(groups, -1, weight.shape[1]).amax(1))


def _as_input(factor: Tensor, layer: Operation) -> Tensor:
    """Per-channel factors in the shape that multiplies the weight of the layer that reads the channels."""
    assert layer.weight is not None
    if layer.weight.ndim == 2:
        return factor
    groups = layer.attributes["groups"]
    rows = factor.view(groups, -1).repeat_interleave(len(layer.weight) // groups, 0)
    return rows[:, :, None, None]


def _store(graph: GraphModule, operation: Operation) -> None:
    """Let the float graph compute with the operation's weight and bias."""
    assert operation.weight is not None
    node = operation.layer
    arguments = list(node.args) + [None] * (3 - len(node.args))
    arguments[1] = add_constant(graph, node, operation.weight)
    arguments[2] = None if operation.bias is None else add_constant(graph, node, operation.bias)
    node.args = tuple(arguments)
