"""Quantized ONNX networks on our kernels: QDQ and QLinear models as one `int8_graph` program.

The graph is read backwards from its outputs. A tensor of stored integers is a value of the program; the float tensors
between DequantizeLinear and QuantizeLinear exist only as the operation that the pair surrounds, with the Relu, Clip and
Add in between fused into it as the kernels fuse them. What is constant is computed first, by onnx's reference.

Weights of any zero point are taken: a difference that leaves int8 is split in two halves, over twice the channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imgopt_fast.ops.int8_graph import Int8GraphBuilder, Int8Program, int8_graph, repack

Array = np.ndarray[Any, Any]
DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.int8): torch.int8}
EXACT = 2**24  # integers that float32, in which sums come out of a program, holds exactly
PASSING = ("Identity", "Dropout")
WAY_OUT = "quantize it too, or cut it off with onnx.utils.extract_model and run it in torch"


class OnnxNetwork(nn.Module):
    """A quantized ONNX model as one program of `int8_graph`. Inference only; made by `from_onnx`.

    Takes and gives tensors as the model does, in its order: float32, uint8 or int8 (N, C, H, W) or (N, C).
    """

    plan: Tensor
    constants: Tensor

    def __init__(self, program: Int8Program, stacked: int, integers: tuple[bool, ...]) -> None:
        super().__init__()
        self.register_buffer("plan", program.plan)
        self.register_buffer("constants", program.constants)
        self._program = program
        self._stacked = stacked  # of a product of stacks of matrices: how many
        self._integers = integers  # which outputs are int32
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        if self._stacked:
            inputs = tuple(x.transpose(0, 1).reshape(x.shape[1], -1) for x in inputs)
        program = self._program._replace(plan=self.plan, constants=self.constants)
        results = int8_graph(list(inputs), program)
        if self._stacked:
            results = [y.view(len(y), self._stacked, -1).transpose(0, 1) for y in results]
        found = [y.to(torch.int32) if exact else y for y, exact in zip(results, self._integers, strict=True)]
        return found[0] if len(found) == 1 else tuple(found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._program = repack(self._program)


def from_onnx(model: Any) -> OnnxNetwork:
    """The quantized ONNX `model` (a path, its bytes or a ModelProto) as a module that runs on `int8_graph`.

    Understood are QDQ models, whose layers stand between DequantizeLinear and QuantizeLinear, and QLinearConv,
    QLinearMatMul, ConvInteger and MatMulInteger with constant weights; around them Relu, Clip, Add, Concat, pools,
    Flatten and Reshape. The arithmetic is that of `int8_conv2d`, which is QLinearConv's; an engine that rounds its
    multipliers in another way may differ by one step where a sum lies between two.

    Raises ValueError, naming the node and the way out, for what has no int8 form; ImportError without onnx.
    """
    onnx = import_module("onnx")
    if isinstance(model, (str, Path)):
        model = onnx.load(model)
    elif isinstance(model, bytes):
        model = onnx.load_from_string(model)
    return _Reader(model).network()


@dataclass(frozen=True)
class _Scale:
    """Quantization of a tensor of stored integers."""

    scale: float
    zero_point: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Target:
    """What becomes of an operation's result: its clamp, and its quantization or float32."""

    scale: _Scale | None = None
    low: float | None = None
    high: float | None = None

    def arguments(self) -> dict[str, Any]:
        if self.scale is None:
            return {"output_scale": None, "output_min": self.low, "output_max": self.high}
        return self.quantization() | {"output_min": self.low, "output_max": self.high}

    def quantization(self) -> dict[str, Any]:
        assert self.scale is not None
        scale, zero_point, dtype = self.scale.scale, self.scale.zero_point, self.scale.dtype
        return {"output_scale": scale, "output_zero_point": zero_point, "output_dtype": dtype}


class _Reader:
    """Walks an ONNX graph backwards and writes the program."""

    def __init__(self, model: Any) -> None:
        self.helper, self.numpy_helper = import_module("onnx.helper"), import_module("onnx.numpy_helper")
        self.graph = model.graph
        self.constants: dict[str, Array] = {t.name: self.numpy_helper.to_array(t) for t in self.graph.initializer}
        self.inputs = {i.name: i for i in self.graph.input if i.name not in self.constants}
        self._fold(model)
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, int] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        self.builder = Int8GraphBuilder()
        self.values: dict[str, int] = {}
        self.ranks: dict[int, int] = {}
        self.channels: dict[int, int | None] = {}
        self.stacked = 0

    def network(self) -> OnnxNetwork:
        outputs, integers = [], []
        for output in self.graph.output:
            exact = output.type.tensor_type.elem_type == 6  # int32
            integers.append(exact)
            outputs.append(self._sums(output.name) if exact else self._output(output.name))
        declared = [name for name in self.inputs if name in self.values]
        if len(declared) < len(self.inputs):
            missing = ", ".join(set(self.inputs) - set(declared))
            raise ValueError(f"model: no int8 layer reads its input {missing}")
        return OnnxNetwork(self.builder.build(outputs), self.stacked, tuple(integers))

    def _fold(self, model: Any) -> None:
        """Compute every node whose inputs are constants, but for the dequantization of weights."""
        reference = import_module("onnx.reference")
        for node in self.graph.node:
            ready = all(not name or name in self.constants for name in node.input)
            if not ready or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                continue
            opsets = {o.domain: o.version for o in model.opset_import}
            evaluator = reference.ReferenceEvaluator(node, opsets=opsets)
            results = evaluator.run(None, {name: self.constants[name] for name in node.input if name})
            self.constants |= dict(zip(node.output, map(np.asarray, results), strict=True))

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _output(self, name: str) -> int:
        """A tensor that the model gives out: stored integers, or float32."""
        node = self.makers.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            x = self._stored(node.input[0], self._scale(node, 1, 2))
            return self._remember(self.builder.dequantize(x), self.ranks[x], self.channels[x])
        if node is not None and node.op_type in _STORED:
            return self._stored(name, None)
        return self._compute(name, _Target())

    def _stored(self, name: str, scale: _Scale | None) -> int:
        """The value of a tensor of stored integers; `scale` is how its reader dequantizes it."""
        if name in self.values:
            return self.values[name]
        if name in self.inputs:
            if scale is None:
                raise ValueError(f"{name}: the model's input goes straight to its output")
            value = self._declare(name, self.builder.input, scale)
        else:
            node = self._maker(name)
            write = _STORED.get(node.op_type)
            if write is None:
                raise self._refuse(node, "has no form on stored integers")
            value = write(self, node, scale)
        self.values[name] = value
        return value

    def _declare(self, name: str, declare: Callable[..., int], scale: _Scale) -> int:
        shape = [d.dim_value for d in self.inputs[name].type.tensor_type.shape.dim]
        if len(shape) == 3 and self.stacked:
            shape = [shape[1], shape[0] * shape[2]]
        if len(shape) not in (2, 4) or not shape[1]:
            raise ValueError(f"{name}: expected an input of (N, C, H, W) or (N, C) with known C, got {shape}")
        value = declare(channels=shape[1], rank=len(shape), scale=scale.scale, zero_point=scale.zero_point,
                        dtype=scale.dtype)  # fmt: skip
        return self._remember(value, len(shape), shape[1])

    def _remember(self, value: int, rank: int, channels: int | None) -> int:
        self.ranks[value], self.channels[value] = rank, channels
        return value

    def _maker(self, name: str) -> Any:
        if name not in self.makers:
            raise ValueError(f"{name}: is no result of a node; weights have to be initializers")
        return self.makers[name]

    def _real(self, name: str) -> int:
        """The stored integers behind a float tensor: what a DequantizeLinear reads."""
        node = self._maker(name)
        if node.op_type in PASSING:
            return self._real(node.input[0])
        if node.op_type != "DequantizeLinear":
            raise self._refuse(node, "computes in float between int8 layers")
        return self._stored(node.input[0], self._scale(node, 1, 2))

    def _scale(self, node: Any, scale: int, zero_point: int) -> _Scale:
        """Scale and zero point among a node's inputs, per tensor."""
        values = self._constant(node, scale)
        zero = self._constant(node, zero_point) if len(node.input) > zero_point and node.input[zero_point] else None
        dtype = np.dtype(np.uint8) if zero is None else zero.dtype
        if values.size != 1 or dtype not in DTYPES:
            raise self._refuse(node, f"activations of {dtype} with {values.size} scales have no int8 form here")
        return _Scale(float(values.reshape(())), 0 if zero is None else int(zero.reshape(())), DTYPES[dtype])

    def _constant(self, node: Any, index: int) -> Array:
        name = node.input[index]
        if name not in self.constants:
            raise self._refuse(node, f"its input {name} is not constant")
        return self.constants[name]

    def _weight(self, node: Any, name: str) -> tuple[Array, Array]:
        """(stored - zero point, scale per channel or one) behind a DequantizeLinear on constants."""
        maker = self.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear" or maker.input[0] not in self.constants:
            raise self._refuse(node, f"its weight {name} is not a quantized constant")
        zero = self._constant(maker, 2) if len(maker.input) > 2 and maker.input[2] else np.zeros(1)
        return _centred(self._constant(maker, 0), zero, self._attributes(maker).get("axis", 1)), self._constant(
            maker, 1
        )

    def _bias(self, node: Any, index: int) -> Array | None:
        if len(node.input) <= index or not node.input[index]:
            return None
        name = node.input[index]
        if name in self.constants:
            return self.constants[name].astype(np.float64)
        steps, scale = self._weight(node, name)
        return steps.astype(np.float64) * scale.astype(np.float64)

    def _attributes(self, node: Any) -> dict[str, Any]:
        found = {a.name: self.helper.get_attribute_value(a) for a in node.attribute}
        if found.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise self._refuse(node, "auto_pad depends on the image size: run onnx's shape inference and write pads")
        return found

    def _refuse(self, node: Any, reason: str) -> ValueError:
        return ValueError(f"{node.name or node.output[0]} ({node.op_type}): {reason}; {WAY_OUT}")

    # --- float operations between DequantizeLinear and QuantizeLinear -------------------------------------------------

    def _compute(self, name: str, target: _Target) -> int:
        """The operation whose float result is the tensor `name`, with what follows it fused."""
        node = self._maker(name)
        a = self._attributes(node)
        kind = node.op_type
        if kind in PASSING:
            return self._compute(node.input[0], target)
        if kind == "Relu":
            return self._compute(node.input[0], _clamped(target, 0.0, None))
        if kind == "Clip":
            bounds = [self._bound(node, i) for i in (1, 2)]
            return self._compute(node.input[0], _clamped(target, *bounds))
        if kind == "Add":
            return self._add(node, target)
        if kind in ("Conv", "Gemm", "MatMul"):
            return self._layer(node, target, None)
        if target.scale is None:
            raise self._refuse(node, "gives float: only convolutions and products do that here")
        inputs = [self._real(i) for i in node.input[: None if kind == "Concat" else 1]]
        if kind == "DequantizeLinear":
            inputs = [self._stored(node.input[0], self._scale(node, 1, 2))]
        return self._passive(node, kind, a, inputs, target)

    def _bound(self, node: Any, index: int) -> float | None:
        if len(node.input) <= index or not node.input[index]:
            return None
        return float(self._constant(node, index).reshape(()))

    def _passive(self, node: Any, kind: str, a: dict[str, Any], inputs: list[int], target: _Target) -> int:
        """An operation without weights, from stored values to stored values of another scale."""
        build, q = self.builder, target.quantization()
        x = inputs[0]
        rank, channels = self.ranks[x], self.channels[x]
        if kind == "AveragePool":
            value = build.avg_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), self._pads(node, a),
                                     count_include_pad=bool(a.get("count_include_pad", 0)), **q)  # fmt: skip
        elif kind == "GlobalAveragePool" or (kind == "ReduceMean" and a.get("keepdims", 1)):
            value = build.global_avg_pool2d(x, **q)
        elif kind == "Concat":
            channels = sum(self.channels[i] or 0 for i in inputs)
            value = build.concat(inputs, **q)
        else:
            if kind == "MaxPool":
                x = self._max_pool(node, a, x)
            elif kind in ("Flatten", "Reshape", "Squeeze"):
                x, rank, channels = self._flat(node, x)
            elif kind != "DequantizeLinear":
                raise self._refuse(node, "has no int8 form here")
            if channels is None:
                return self._remember(x, rank, None)  # flattened pixels keep their scale
            value = build.concat([x], **q)
        clamps = target.low is not None or target.high is not None
        if clamps and kind != "DequantizeLinear":
            assert target.scale is not None
            least, most = (float("-inf") if v is None else v for v in (target.low, target.high))
            q_low = (torch.iinfo(target.scale.dtype).min - target.scale.zero_point) * target.scale.scale
            if least > q_low or (target.high is not None and most < -q_low):
                raise self._refuse(node, "a clamp behind it is narrower than its quantization")
        return self._remember(value, rank, channels)

    def _add(self, node: Any, target: _Target) -> int:
        """A residual goes into the product before it, where nothing else reads that; a constant one is its bias."""
        for product, other in ((0, 1), (1, 0)):
            maker = self.makers.get(node.input[product])
            if maker is None or maker.op_type not in ("Conv", "Gemm", "MatMul"):
                continue
            if self.readers[node.input[product]] == 1:
                second = self.makers.get(node.input[other])
                constant = node.input[other] in self.constants
                if constant or (second is not None and second.input and second.input[0] in self.constants):
                    return self._layer(maker, target, None, self._bias(node, other))
                return self._layer(maker, target, self._real(node.input[other]))
        if target.scale is None:
            raise self._refuse(node, "gives float: only convolutions and products do that here")
        a, b = (self._real(name) for name in node.input)
        value = self.builder.add(a, b, **target.arguments())
        return self._remember(value, self.ranks[a], self.channels[a])

    def _layer(self, node: Any, target: _Target, residual: int | None, more: Array | None = None) -> int:
        a = self._attributes(node)
        x = self._real(node.input[0])
        weight, scale = self._weight(node, node.input[1])
        bias = self._bias(node, 2) if more is None else more.reshape(-1)
        if node.op_type == "Conv":
            return self._convolve(node, a, x, weight, scale, bias, target, residual)
        if a.get("alpha", 1.0) != 1.0 or a.get("beta", 1.0) != 1.0 or a.get("transA", 0):
            raise self._refuse(node, "alpha, beta or transA other than the default")
        matrix = weight if node.op_type == "Gemm" and a.get("transB", 0) else weight.T
        return self._multiply(x, matrix, scale, bias, target, residual)

    def _convolve(
        self, node: Any, a: dict[str, Any], x: int, weight: Array, scale: Array, bias: Array | None, target: _Target,
        residual: int | None = None,
    ) -> int:  # fmt: skip
        groups = a.get("group", 1)
        if weight.ndim != 4:
            raise self._refuse(node, "only convolutions over images have an int8 form")
        if not _fits(weight):
            if groups > 1:
                weight, groups = _dense(weight, groups), 1
            x, weight = self._split(x, weight)
        value = self.builder.conv2d(
            x, _int8(weight), _scales(scale), _floats(bias), stride=a.get("strides", [1, 1]),
            padding=self._pads(node, a), dilation=a.get("dilations", [1, 1]), groups=groups, residual=residual,
            **target.arguments(),
        )  # fmt: skip
        return self._remember(value, 4, len(weight))

    def _multiply(
        self, x: int, matrix: Array, scale: Array, bias: Array | None, target: _Target, residual: int | None = None
    ) -> int:
        """`x` (N, K) times `matrix` (O, K)."""
        if not _fits(matrix):
            x, matrix = self._split(x, matrix)
        arguments = target.arguments() | {"residual": residual}
        value = self.builder.linear(x, _int8(matrix), _scales(scale), _floats(bias), **arguments)
        return self._remember(value, 2, len(matrix))

    def _split(self, x: int, weight: Array) -> tuple[int, Array]:
        """The same sums with weights that fit into int8: x·w = x·(w/2) + x·(w - w/2)."""
        half = weight // 2
        given = self.builder._values[x]
        doubled = self.builder.concat([x, x], output_scale=given.scale, output_zero_point=given.zero_point,
                                      output_dtype=given.dtype)  # fmt: skip
        return doubled, np.concatenate([half, weight - half], 1)

    def _pads(self, node: Any, a: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
        if a.get("ceil_mode", 0):
            raise self._refuse(node, "ceil_mode has no int8 form")
        top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
        return (top, bottom), (left, right)

    # --- operations on stored integers --------------------------------------------------------------------------------

    def _quantize(self, node: Any, scale: _Scale | None) -> int:
        own = self._scale(node, 1, 2)
        source = node.input[0]
        if source in self.inputs:
            value = self._declare(source, self.builder.quantize, own)
            self.values[source] = value
            return value
        return self._compute(source, _Target(own))

    def _qlinear_conv(self, node: Any, scale: _Scale | None) -> int:
        given, made = self._scale(node, 1, 2), self._scale(node, 6, 7)
        weight, scales = _centred(self._constant(node, 3), self._constant(node, 5), 0), self._constant(node, 4)
        steps = self._constant(node, 8) if len(node.input) > 8 and node.input[8] else None
        bias = None if steps is None else steps * (given.scale * scales.astype(np.float64))
        x = self._stored(node.input[0], given)
        return self._convolve(node, self._attributes(node), x, weight, scales, bias, _Target(made))

    def _qlinear_matmul(self, node: Any, scale: _Scale | None) -> int:
        given, made = self._scale(node, 1, 2), self._scale(node, 6, 7)
        weight, scales = self._constant(node, 3).astype(np.int64), self._constant(node, 4)
        weight = weight - self._constant(node, 5).astype(np.int64).reshape(-1)
        if weight.ndim == 3:
            weight = self._stack(node, weight)
        if weight.ndim != 2:
            raise self._refuse(node, "only matrices and stacks of them have an int8 form")
        return self._multiply(self._stored(node.input[0], given), weight.T, scales, None, _Target(made))

    def _stack(self, node: Any, weight: Array) -> Array:
        """A product of stacks (B, M, K)·(B, K, N) as one of (M, B·K)·(B·K, B·N), whose weight is block-diagonal."""
        alone = len(self.graph.output) == 1 and node.output[0] == self.graph.output[0].name
        if not alone or node.input[0] not in self.inputs:
            raise self._refuse(node, "a product of stacks of matrices inside a network has no int8 form")
        self.stacked = len(weight)
        count, rows, columns = weight.shape
        whole = np.zeros((count, rows, count, columns), np.int64)
        for i in range(count):
            whole[i, :, i] = weight[i]
        return whole.reshape(count * rows, count * columns)

    def _max_pool(self, node: Any, a: dict[str, Any], x: int) -> int:
        if any(d != 1 for d in a.get("dilations", [])):
            raise self._refuse(node, "a dilated max pool has no int8 form")
        value = self.builder.max_pool2d(x, a["kernel_shape"], a.get("strides", [1, 1]), self._pads(node, a))
        return self._remember(value, 4, self.channels[x])

    def _flat(self, node: Any, x: int) -> tuple[int, int, int | None]:
        """Flatten, and the Reshape and Squeeze that do the same: value, rank and channels."""
        if node.op_type == "Reshape" and self._constant(node, 1).size != 2:
            raise self._refuse(node, "only reshaping to (N, C) has an int8 form")
        if self.ranks[x] == 2:
            return x, 2, self.channels[x]
        value = self.builder.flatten(x)
        channels = self.builder._values[value].channels
        return self._remember(value, 2, channels), 2, channels

    def _passing(self, node: Any, scale: _Scale | None) -> int:
        x = self._stored(node.input[0], scale)
        if node.op_type == "MaxPool":
            return self._max_pool(node, self._attributes(node), x)
        return x if node.op_type in PASSING else self._flat(node, x)[0]

    def _sums(self, name: str) -> int:
        """The int32 result of ConvInteger or MatMulInteger."""
        node = self._maker(name)
        if node.op_type not in ("ConvInteger", "MatMulInteger"):
            raise self._refuse(node, "gives int32, which only ConvInteger and MatMulInteger do here")
        zero = self._constant(node, 2).reshape(-1) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        if zero.size != 1:
            raise self._refuse(node, "a zero point per row has no int8 form")
        stored = self.inputs[node.input[0]].type.tensor_type.elem_type if node.input[0] in self.inputs else 2
        x = self._stored(node.input[0], _Scale(1.0, int(zero[0]), torch.int8 if stored == 3 else torch.uint8))
        offset = self._constant(node, 3) if len(node.input) > 3 and node.input[3] else np.zeros(1)
        convolution = node.op_type == "ConvInteger"
        weight = _centred(self._constant(node, 1), offset, 0 if convolution else 1)
        highest = 255 * np.abs(weight).sum(axis=(1, 2, 3) if convolution else 0).max()
        if highest >= EXACT:
            raise self._refuse(node, f"its sums could reach {highest}, and leave the program as float32")
        if convolution:
            return self._convolve(node, self._attributes(node), x, weight, np.ones(1), None, _Target())
        return self._multiply(x, weight.T, np.ones(1), None, _Target())


_STORED: dict[str, Callable[[_Reader, Any, _Scale | None], int]] = {
    "QuantizeLinear": _Reader._quantize,
    "QLinearConv": _Reader._qlinear_conv,
    "QLinearMatMul": _Reader._qlinear_matmul,
    "MaxPool": _Reader._passing,
    "Flatten": _Reader._passing,
    "Reshape": _Reader._passing,
    "Squeeze": _Reader._passing,
    "Identity": _Reader._passing,
}


def _clamped(target: _Target, low: float | None, high: float | None) -> _Target:
    """`target` behind one more clamp, which acts first."""
    lows, highs = [v for v in (low, target.low) if v is not None], [v for v in (high, target.high) if v is not None]
    return replace(target, low=max(lows, default=None), high=min(highs, default=None))


def _centred(stored: Array, zero: Array, axis: int) -> Array:
    """stored - zero point, the zero points along `axis` where there are several."""
    zero = np.asarray(zero, np.int64).reshape(-1)
    shape = [1] * stored.ndim
    if zero.size > 1:
        shape[axis] = zero.size
    return np.asarray(stored.astype(np.int64) - (zero.reshape(shape) if stored.ndim else zero[0]))


def _fits(weight: Array) -> bool:
    return bool(weight.size == 0 or (weight.min() >= -128 and weight.max() <= 127))


def _dense(weight: Array, groups: int) -> Array:
    """A grouped weight with the zeros that it leaves out."""
    outputs, inputs = len(weight) // groups, weight.shape[1]
    whole = np.zeros((len(weight), inputs * groups, *weight.shape[2:]), np.int64)
    for g in range(groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        whole[rows, g * inputs : (g + 1) * inputs] = weight[rows]
    return whole


def _int8(weight: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(weight.astype(np.int8)))


def _scales(scale: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(scale.astype(np.float32).reshape(-1)))


def _floats(bias: Array | None) -> Tensor | None:
    return None if bias is None else torch.from_numpy(np.ascontiguousarray(bias.astype(np.float64)))
