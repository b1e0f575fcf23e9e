"""The operations that make tensors of stored integers: quantization, integer operators, and what moves integers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from imgopt_fast.compress.from_onnx import products
from imgopt_fast.compress.from_onnx.graph import DTYPES, PASSING
from imgopt_fast.compress.from_onnx.products import Array, Scale, Target, Weights, block_diagonal, centred

if TYPE_CHECKING:
    from imgopt_fast.compress.from_onnx.reader import Reader

EXACT = 2**24  # integers that float32, in which sums come out of a program, holds exactly
INT8 = 3  # TensorProto.INT8
Clamp = tuple[float | None, float | None]  # of stored integers
FREE: Clamp = (None, None)


def _quantize(reader: "Reader", node: Any, scale: Scale | None, clamp: Clamp = FREE) -> int:
    graph = reader.graph
    own = graph.scale(node, 1, 2)
    name = node.input[0]
    source, factor = name, 1.0
    if graph.kind(name) == "Mul":  # by the inverse of the scale
        source, factor = _times_constant(reader, graph.maker(name))
    if source in graph.inputs:
        return _quantize_input(reader, node, source, Scale(own.scale / factor, own.zero_point, own.dtype))
    if graph.kind(name) == "Floor":
        name = _before_half(reader, graph.maker(name))
    elif reader.shift:
        raise graph.refuse(node, "rounds half to even in a network that elsewhere rounds half up")
    return reader.compute(name, _target(own, clamp))


def _quantize_input(reader: "Reader", node: Any, name: str, scale: Scale) -> int:
    if name not in reader.values:
        reader.values[name] = reader.declare(name, reader.builder.quantize, scale)
    value = reader.values[name]
    found = reader.builder.value(value)
    if (found.scale, found.zero_point, found.dtype) != (scale.scale, scale.zero_point, scale.dtype):
        raise reader.graph.refuse(node, f"{name} is quantized in two ways")
    return value


def _times_constant(reader: "Reader", node: Any) -> tuple[str, float]:
    """The tensor that a Mul multiplies, and by what; ("", 1) where that is no number."""
    for i in (0, 1):
        number = reader.graph.constants.get(node.input[i])
        if number is not None and number.size == 1:
            return node.input[1 - i], float(number.reshape(()))
    return "", 1.0


def _before_half(reader: "Reader", floor: Any) -> str:
    """What is rounded by Floor(x + 0.5)."""
    node = reader.graph.makers.get(floor.input[0])
    name, half = "", 0.0
    if node is not None and node.op_type == "Add":
        for i in (0, 1):
            number = reader.graph.constants.get(node.input[i])
            if number is not None and number.size == 1:
                name, half = node.input[1 - i], float(number.reshape(()))
    if half != 0.5:
        raise reader.graph.refuse(floor, "rounds down, which has no int8 form")
    return name


def _clip(reader: "Reader", node: Any, scale: Scale | None) -> int:
    """A clamp of stored integers goes into the operation before it."""
    graph = reader.graph
    maker = graph.maker(node.input[0])
    write = {"QuantizeLinear": _quantize, "QLinearConv": _qlinear_conv}.get(maker.op_type)
    if write is None:
        raise graph.refuse(node, "clamps what neither QuantizeLinear nor QLinearConv made")
    return write(reader, maker, scale, (graph.bound(node, 1), graph.bound(node, 2)))


def _target(scale: Scale, clamp: Clamp) -> Target:
    low, high = (None if bound is None else (bound - scale.zero_point) * scale.scale for bound in clamp)
    return Target(scale, low, high)


def _qlinear_conv(reader: "Reader", node: Any, scale: Scale | None, clamp: Clamp = FREE) -> int:
    graph = reader.graph
    given, made = graph.scale(node, 1, 2), graph.scale(node, 6, 7)
    steps, scales = centred(graph.constant(node, 3), graph.constant(node, 5), 0), graph.constant(node, 4)
    bias = graph.constant(node, 8) * (given.scale * scales.astype(np.float64)) if graph.given(node, 8) else None
    x = reader.stored(node.input[0], given)
    weights = Weights(steps, scales, bias)
    return products.convolve(reader.builder, x, weights, _target(made, clamp), graph.window(node), None)


def _qlinear_matmul(reader: "Reader", node: Any, scale: Scale | None) -> int:
    graph = reader.graph
    given, made = graph.scale(node, 1, 2), graph.scale(node, 6, 7)
    steps = graph.constant(node, 3).astype(np.int64) - graph.constant(node, 5).astype(np.int64).reshape(-1)
    if steps.ndim == 3:  # a product of stacks (B, M, K)·(B, K, N) is one of (M, B·K)·(B·K, B·N)
        alone = len(graph.graph.output) == 1 and node.output[0] == graph.graph.output[0].name
        if not alone or node.input[0] not in graph.inputs:
            raise graph.refuse(node, "a product of stacks of matrices inside a network has no int8 form")
        reader.stacked, steps = len(steps), block_diagonal(steps)
    if steps.ndim != 2:
        raise graph.refuse(node, "only matrices and stacks of them have an int8 form")
    x = reader.stored(node.input[0], given)
    return products.multiply(reader.builder, x, Weights(steps.T, graph.constant(node, 4)), Target(made))


def sums(reader: "Reader", name: str) -> int:
    """The int32 result of ConvInteger or MatMulInteger."""
    return integer_product(reader, reader.graph.maker(name), Target(), np.ones(1), None)


def integer_product(
    reader: "Reader", node: Any, target: Target, factor: Array, bias: Array | None, residual: int | None = None
) -> int:
    """The sums of ConvInteger or MatMulInteger, with `bias`, times `factor`, one or one for each output."""
    graph = reader.graph
    if node.op_type not in ("ConvInteger", "MatMulInteger"):
        raise graph.refuse(node, "gives int32, which only ConvInteger and MatMulInteger do here")
    zero = graph.constant(node, 2).reshape(-1) if graph.given(node, 2) else np.zeros(1, _dtype(reader, node.input[0]))
    if zero.size != 1:
        raise graph.refuse(node, "a zero point per row has no int8 form")
    x = reader.stored(node.input[0], Scale(1.0, int(zero[0]), DTYPES[zero.dtype]))
    convolution = node.op_type == "ConvInteger"
    offset = graph.constant(node, 3) if graph.given(node, 3) else np.zeros(1)
    steps = centred(graph.constant(node, 1), offset, 0 if convolution else 1)
    steps = steps if convolution else steps.T
    highest = 255 * np.abs(steps.reshape(len(steps), -1)).sum(1).max(initial=0)
    if target.scale is None and bias is None and factor.size == 1 and highest >= EXACT:
        raise graph.refuse(node, f"its sums could reach {highest}, and leave the program as float32")
    factor = factor.reshape(-1)
    weights = Weights(steps, factor, None if bias is None else bias.reshape(-1) * factor)
    if convolution:
        return products.convolve(reader.builder, x, weights, target, graph.window(node), residual)
    return products.multiply(reader.builder, x, weights, target, residual)


def _dtype(reader: "Reader", name: str) -> Any:
    """Of a tensor of stored integers that has no zero point to tell it."""
    info = reader.graph.inputs.get(name)
    return np.int8 if info is not None and info.type.tensor_type.elem_type == INT8 else np.uint8


def max_pool(reader: "Reader", node: Any, x: int) -> int:
    a = reader.graph.attributes(node)
    if any(d != 1 for d in a.get("dilations", [])):
        raise reader.graph.refuse(node, "a dilated max pool has no int8 form")
    return reader.builder.max_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), reader.graph.pads(node))


def flat(reader: "Reader", node: Any, x: int) -> int:
    """Flatten, and the Reshape and Squeeze that do the same."""
    if node.op_type == "Reshape" and reader.graph.constant(node, 1).size != 2:
        raise reader.graph.refuse(node, "only reshaping to (N, C) has an int8 form")
    return x if reader.builder.value(x).rank == 2 else reader.builder.flatten(x)


def _move(reader: "Reader", node: Any, scale: Scale | None) -> int:
    x = reader.stored(node.input[0], scale)
    if node.op_type == "MaxPool":
        return max_pool(reader, node, x)
    return x if node.op_type in PASSING else flat(reader, node, x)


OPERATIONS: dict[str, Callable[["Reader", Any, Scale | None], int]] = {
    "QuantizeLinear": _quantize,
    "QLinearConv": _qlinear_conv,
    "QLinearMatMul": _qlinear_matmul,
    "Clip": _clip,
    **dict.fromkeys(("MaxPool", "Flatten", "Reshape", "Squeeze", *PASSING), _move),
}
