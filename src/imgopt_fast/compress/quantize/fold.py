"""Batch norms and zero padding disappear into the convolutions that they surround.

A batch norm behind a convolution or linear layer with constant weight is a per-channel scale of its weight and a shift
of its bias. One that stands alone (behind a concat or an add, as in DenseNet) becomes a depthwise 1×1 convolution,
which int8 represents exactly up to its scale. Zero padding in front of a convolution becomes its own padding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from imgopt_fast.compress.quantize.trace import add_constant, arguments, aten, constant

CONVOLUTIONS = (aten.conv2d.default, aten.conv2d.padding)
BATCH_NORMS = (aten.batch_norm.default,)
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def fold(graph: GraphModule) -> None:
    """Fold the batch norms and the zero padding of `graph`, in place; its outputs stay the same up to rounding."""
    for node in list(graph.graph.nodes):
        if node.target in BATCH_NORMS:
            _fold_batch_norm(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def padding_of(node: Node, weight: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((top, bottom), (left, right)) of a convolution, string padding resolved; None if it is no plain numbers."""
    values = arguments(node)
    if node.target is aten.conv2d.padding:
        if values["padding"] == "valid":
            return (0, 0), (0, 0)
        total = [step * (size - 1) for step, size in zip(pair(values["dilation"]), weight.shape[2:], strict=True)]
        return (total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2)
    padding = pair(values["padding"])
    if not all(isinstance(value, int) for value in padding):
        return None
    return (padding[0], padding[0]), (padding[1], padding[1])


def pair(value: Any) -> list[Any]:
    """[h, w] of a number, a list of one or a list of two."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def absorbed_pad(node: Node) -> tuple[Node, tuple[tuple[int, int], tuple[int, int]]] | None:
    """The source and amounts of a zero padding node that a convolution could do itself; None for any other node."""
    if node.target not in PADS:
        return None
    values: dict[str, Any] = arguments(node)
    amounts = list(values["pad"]) + [0] * (4 - len(values["pad"]))
    plain = len(amounts) == 4 and all(isinstance(n, int) and n >= 0 for n in amounts)
    if not plain or values.get("mode", "constant") != "constant" or values["value"]:
        return None
    left, right, top, bottom = amounts
    return values["self"], ((top, bottom), (left, right))


def _fold_batch_norm(graph: GraphModule, node: Node) -> None:
    values = arguments(node)
    mean, variance = constant(graph, values["running_mean"]), constant(graph, values["running_var"])
    if values["training"] or mean is None or variance is None:
        return  # normalises by the batch itself: not a constant map
    scale, shift = _affine(graph, values, mean, variance)
    source = values["input"]
    if _foldable(graph, source):
        weight, bias = constant(graph, source.args[1]), constant(graph, arguments(source)["bias"])
        assert weight is not None
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
        shifted = shift if bias is None else shift + bias.double() * scale
        new = list(source.args[:3]) + [None] * (3 - len(source.args[:3])) + list(source.args[3:])
        new[1] = add_constant(graph, source, folded.to(weight.dtype))
        new[2] = add_constant(graph, source, shifted.to(weight.dtype))
        source.args = tuple(new)
        node.replace_all_uses_with(source)
    elif source.meta["val"].ndim == 4:
        channels = len(scale)
        weight_node = add_constant(graph, node, scale.to(mean.dtype).reshape(channels, 1, 1, 1))
        bias_node = add_constant(graph, node, shift.to(mean.dtype))
        node.target = aten.conv2d.default
        node.args = (source, weight_node, bias_node, [1, 1], [0, 0], [1, 1], channels)


def _affine(graph: GraphModule, values: dict[str, Any], mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """The batch norm as x · scale + shift, in float64: the folded weights round once."""
    scale = torch.rsqrt(variance.double() + values["eps"])
    gain, shift = constant(graph, values["weight"]), constant(graph, values["bias"])
    if gain is not None:
        scale = scale * gain.double()
    return scale, -mean.double() * scale + (0 if shift is None else shift.double())


def _foldable(graph: GraphModule, source: Any) -> bool:
    """Whether `source` is a layer with constant weight whose result only the batch norm reads."""
    if (
        not isinstance(source, Node)
        or source.target not in (*CONVOLUTIONS, aten.linear.default)
        or len(source.users) > 1
    ):
        return False
    bias = arguments(source)["bias"]
    return constant(graph, source.args[1]) is not None and (bias is None or constant(graph, bias) is not None)
