"""The operations between DequantizeLinear and QuantizeLinear: each becomes one step of the program."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from imgopt_fast.compress.from_onnx import products, stored
from imgopt_fast.compress.from_onnx.graph import PASSING
from imgopt_fast.compress.from_onnx.products import Array, Target, Weights

if TYPE_CHECKING:
    from imgopt_fast.compress.from_onnx.reader import Reader

FLOAT_RESULT = "gives float: only convolutions and products do that here"


def _pass(reader: "Reader", node: Any, target: Target) -> int:
    return reader.compute(node.input[0], target)


def _relu(reader: "Reader", node: Any, target: Target) -> int:
    return reader.compute(node.input[0], target.clamped(0.0, None))


def _clip(reader: "Reader", node: Any, target: Target) -> int:
    return reader.compute(node.input[0], target.clamped(*(reader.graph.bound(node, i) for i in (1, 2))))


def _add(reader: "Reader", node: Any, target: Target) -> int:
    """A residual goes into the product before it, where nothing else reads that; a constant one is its bias."""
    graph = reader.graph
    for product, other in ((0, 1), (1, 0)):
        maker = graph.makers.get(node.input[product])
        if maker is None or graph.readers[node.input[product]] > 1:
            continue
        if maker.op_type in ("Conv", "Gemm", "MatMul"):
            second = graph.makers.get(node.input[other])
            constant = node.input[other] in graph.constants
            if constant or (second is not None and second.input and second.input[0] in graph.constants):
                return _product(reader, maker, target, None, graph.bias(node, other))
            return _product(reader, maker, target, reader.real(node.input[other]))
        if maker.op_type == "Mul":
            return _scaled(reader, maker, target, reader.real(node.input[other]))
    if target.scale is None:
        raise graph.refuse(node, FLOAT_RESULT)
    a, b = (reader.real(name) for name in node.input)
    return reader.builder.add(a, b, **target.arguments())


def _product(
    reader: "Reader", node: Any, target: Target, residual: int | None = None, bias: Array | None = None
) -> int:
    """Conv, Gemm or MatMul; `bias` in the place of its own."""
    graph, build = reader.graph, reader.builder
    a = graph.attributes(node)
    x = reader.real(node.input[0])
    steps, scale = graph.weight(node, node.input[1])
    weights = Weights(steps, scale, graph.bias(node, 2) if bias is None else bias)
    if node.op_type == "Conv":
        return products.convolve(build, x, weights, target, graph.window(node), residual)
    if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
        raise graph.refuse(node, "alpha, beta or transA other than the default")
    matrix = steps if node.op_type == "Gemm" and a.get("transB", 0) else steps.T
    return products.multiply(build, x, Weights(matrix, scale, weights.bias), target, residual)


def _scaled(reader: "Reader", node: Any, target: Target, residual: int | None = None) -> int:
    """Sums times a constant: those of an integer operator, or of the pixels that an average takes."""
    graph = reader.graph
    which = next((i for i in (1, 0) if node.input[i] in graph.constants), None)
    if which is None or (node.op_type == "Div" and which == 0):
        raise graph.refuse(node, "computes in float between int8 layers")
    source, factor = node.input[1 - which], graph.constants[node.input[which]].astype(np.float64)
    maker, factor = graph.maker(source), 1 / factor if node.op_type == "Div" else factor
    if maker.op_type == "Cast":
        sums, bias = graph.maker(maker.input[0]), None
        if sums.op_type == "Add":
            place = next((i for i in (0, 1) if sums.input[i] in graph.constants), None)
            if place is None:
                raise graph.refuse(sums, "adds two sums of products")
            bias, sums = graph.constants[sums.input[place]], graph.maker(sums.input[1 - place])
        return stored.integer_product(reader, sums, target, factor, bias, residual)
    if maker.op_type in ("Conv", "ReduceSum") and residual is None and factor.size == 1 and target.scale is not None:
        return _average(reader, maker, float(factor.reshape(())), target)
    raise graph.refuse(node, "computes in float between int8 layers")


def _average(reader: "Reader", node: Any, factor: float, target: Target) -> int:
    """Sums of pixels times `factor`: an average whose input is read at as much more as it has pixels."""
    graph, build, a = reader.graph, reader.builder, reader.graph.attributes(node)
    x = reader.real(node.input[0])
    scale, channels = build.value(x).scale, build.value(x).channels
    if node.op_type == "ReduceSum":
        axes = graph.constant(node, 1).tolist() if graph.given(node, 1) else None
        if axes not in ([2, 3], [-2, -1]) or not a.get("keepdims", 1):
            raise graph.refuse(node, "sums something else than the pixels of each channel")
        x = build.reread(x, scale * factor * graph.pixels(node))
        return build.global_avg_pool2d(x, **target.quantization())
    ones = graph.constant(node, 1)
    if not (ones == 1).all() or a.get("group", 1) != channels or ones.shape[:2] != (channels, 1):
        raise graph.refuse(node, f"its weight {node.input[1]} is not a quantized constant")
    window = [int(side) for side in ones.shape[2:]]
    x = build.reread(x, scale * factor * window[0] * window[1])
    return build.avg_pool2d(x, window, a.get("strides", [1, 1]), graph.pads(node), **target.quantization())


def _passive(reader: "Reader", node: Any, target: Target) -> int:
    """An operation without weights, from stored values to stored values of another scale."""
    graph, build, kind = reader.graph, reader.builder, node.op_type
    if target.scale is None:
        raise graph.refuse(node, FLOAT_RESULT)
    q, a = target.quantization(), graph.attributes(node)
    names = node.input if kind == "Concat" else [node.output[0] if kind == "DequantizeLinear" else node.input[0]]
    xs = [reader.real(name) for name in names]
    x = xs[0]
    if kind == "AveragePool":
        counted = bool(a.get("count_include_pad", 0))
        value = build.avg_pool2d(
            x, a["kernel_shape"], a.get("strides", [1, 1]), graph.pads(node), count_include_pad=counted, **q
        )
    elif kind == "GlobalAveragePool" or (kind == "ReduceMean" and a.get("keepdims", 1)):
        value = build.global_avg_pool2d(x, **q)
    elif kind in ("Concat", "DequantizeLinear"):
        value = build.concat(xs, **q)
    else:
        x = stored.max_pool(reader, node, x) if kind == "MaxPool" else stored.flat(reader, node, x)
        if build.value(x).channels is None:
            return x  # flattened pixels keep their scale
        value = build.concat([x], **q)
    if kind != "DequantizeLinear" and (target.low is not None or target.high is not None):
        least, most = (float("-inf") if v is None else v for v in (target.low, target.high))
        q_low = (torch.iinfo(target.scale.dtype).min - target.scale.zero_point) * target.scale.scale
        if least > q_low or (target.high is not None and most < -q_low):
            raise graph.refuse(node, "a clamp behind it is narrower than its quantization")
    return value


OPERATIONS: dict[str, Callable[["Reader", Any, Target], int]] = {
    **dict.fromkeys(PASSING, _pass),
    "Relu": _relu,
    "Clip": _clip,
    "Add": _add,
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), _product),
    **dict.fromkeys(("Mul", "Div"), _scaled),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean", "MaxPool"), _passive),
    **dict.fromkeys(("Concat", "Flatten", "Reshape", "Squeeze", "DequantizeLinear"), _passive),
}
