"""StableHLO: the network as a JAX function, lowered by jax.export for TPU, CUDA and CPU at once.

A folder with two files: `network.jax_export`, which `jax.export.deserialize` turns into a callable on any of the three
platforms without this package, and `network.mlirbc`, the StableHLO module alone in its portable form, for other
compilers. Weights are constants inside; the batch size is symbolic. int8 layers have the bits of `int8_conv2d`.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imgopt_fast._arguments import as_pair, as_sides
from imgopt_fast.compress.quantize.fuse import CLAMPS, RESHAPES
from imgopt_fast.compress.quantize.trace import aten
from imgopt_fast.targets.errors import refuse
from imgopt_fast.targets.network import FLOAT, Layer, Network, Use
from imgopt_fast.targets.verification import Array, Engine

PACKAGES, VERIFIERS, EXTRA = ("jax",), (), "jax"
PLATFORMS = ("tpu", "cuda", "cpu")
CALLABLE, MODULE = "network.jax_export", "network.mlirbc"


def write(network: Network, path: Path) -> list[str]:
    """Write the folder `path`. Raises ValueError for a layer that has no JAX form here."""
    jax, export = import_module("jax"), import_module("jax.export")
    (batch,) = export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *network.images.shape[1:]), np.float32)
    exported = export.export(jax.jit(as_function(network)), platforms=PLATFORMS)(shape)
    path.mkdir()
    (path / CALLABLE).write_bytes(exported.serialize())
    (path / MODULE).write_bytes(exported.mlir_module_serialized)
    return [f"lowered for {', '.join(exported.platforms)}; StableHLO calling convention "
            f"{exported.calling_convention_version}"]  # fmt: skip


def as_function(network: Network) -> Callable[[Any], Any]:
    """The network as a function of JAX arrays: images to its output, or a tuple of them."""
    for layer in network.float_layers:
        if layer.operation not in _FLOAT_LAYERS:
            raise refuse(layer, "stablehlo", "no JAX form is known here")

    def function(images: Any) -> Any:
        values: dict[int, Any] = {value: network.tensors[value].numpy() for value in network.constants}
        values[network.input] = images
        for layer in network.layers:
            if layer.kind == FLOAT:
                result = _FLOAT_LAYERS[layer.operation](_Arguments(layer, values, network))
            else:
                result = _INT8_LAYERS[layer.kind](network, layer, [values[i] for i in layer.inputs], values)
            values[layer.output] = result
        outputs = tuple(values[value] for value in network.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    return function


def engines(path: Path, network: Network) -> list[Engine]:
    """XLA on this machine's CPU, from the file."""
    jax, export = import_module("jax"), import_module("jax.export")
    exported = export.deserialize(bytearray((path / CALLABLE).read_bytes()))
    device = jax.devices("cpu")[0]
    compiled = jax.jit(exported.call)

    def run(images: Array) -> list[Array]:
        with jax.default_device(device):
            results = compiled(images)
        return [np.asarray(result) for result in (results if isinstance(results, tuple) else (results,))]

    exact = not network.float_layers
    return [Engine(f"XLA (jax {jax.__version__}), CPU", run, exact=exact)]


# --- int8 layers ------------------------------------------------------------------------------------------------------


def _rounded(network: Network, layer: Layer, steps: Any) -> Any:
    """float32 steps of the output's scale, clamped, rounded, stored."""
    jnp = import_module("jax.numpy")
    out = network.values[layer.output]
    low, high = network.bounds(layer)
    stored = jnp.round(jnp.clip(steps, low, high)).astype(jnp.int32) + out.zero_point
    return stored.astype(_dtype(out.dtype))


def _shifted(network: Network, layer: Layer, total: Any, right: int) -> Any:
    """int32 steps times 2^-right, half up, clamped, stored."""
    jnp = import_module("jax.numpy")
    out = network.values[layer.output]
    if right > 31:
        total = jnp.zeros_like(total)
    elif right > 0:
        total = (total >> right) + ((total >> (right - 1)) & 1)
    else:
        total = jnp.clip(total, -512, 512) << min(-right, 20)
    low, high = network.steps(layer)
    return jnp.clip(total + out.zero_point, low, high).astype(_dtype(out.dtype))


def _quantize(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    jnp = import_module("jax.numpy")
    steps = given[0] * np.float32(1.0 / network.values[layer.output].scale)
    return _rounded(network, layer, jnp.where(jnp.isnan(steps), -jnp.inf, steps))


def _dequantize(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    return _steps(network, layer, given, 0).astype(np.float32) * np.float32(network.values[layer.inputs[0]].scale)


def _product(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    from imgopt_fast.jax import int8_conv2d

    assert layer.weights is not None
    weights, out = layer.weights, network.values[layer.output]
    flat = given[0].ndim == 2
    options: dict[str, Any] = {}
    if layer.kind == "conv2d":
        options = {name: layer.attributes[name] for name in ("stride", "padding", "dilation")}
    if layer.residual is not None:
        added, described = values[layer.residual], network.values[layer.residual]
        options["residual"] = added[:, :, None, None] if flat else added
        options |= {"residual_scale": described.scale, "residual_zero_point": described.zero_point}
    if out.quantized:
        options |= {"output_scale": out.scale, "output_zero_point": out.zero_point, "output_dtype": _dtype(out.dtype)}
    y = int8_conv2d(
        given[0][:, :, None, None] if flat else given[0],
        weights.weight.numpy(),
        weights.bias.numpy(),
        input_scale=weights.input_scale,
        input_zero_point=weights.input_zero_point,
        weight_scale=weights.weight_scale.numpy(),
        groups=weights.groups,
        output_min=layer.attributes["output_min"],
        output_max=layer.attributes["output_max"],
        requantize="shift" if network.shift else "float",
        **options,
    )
    return y[:, :, 0, 0] if flat else y


def _add(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    from imgopt_fast.jax import _apart

    out = network.values[layer.output]
    a, b = (_steps(network, layer, given, i) for i in (0, 1))
    if network.shift:
        fine = [_exponent(network.values[i].scale) for i in layer.inputs]
        finest = max(fine)
        if max(finest - f for f in fine) > 22:
            raise refuse(layer, "stablehlo", "its inputs differ too much in scale for int32")
        total = (a << (finest - fine[0])) + (b << (finest - fine[1]))
        return _shifted(network, layer, total, finest - _exponent(out.scale))
    scaled = [
        _apart(x.astype(np.float32) * np.float32(network.values[i].scale / out.scale))
        for x, i in zip((a, b), layer.inputs, strict=True)
    ]
    return _rounded(network, layer, scaled[0] + scaled[1])


def _concat(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    jnp = import_module("jax.numpy")
    out, parts = network.values[layer.output], []
    for i, value in enumerate(layer.inputs):
        x, scale = _steps(network, layer, given, i), network.values[value].scale
        if network.shift:
            parts.append(_shifted(network, layer, x, _exponent(scale) - _exponent(out.scale)))
        else:
            parts.append(_rounded(network, layer, x.astype(np.float32) * np.float32(scale / out.scale)))
    return jnp.concatenate(parts, 1)


def _max_pool(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    lax = import_module("jax.lax")
    x = given[0]
    least = np.array(np.iinfo(x.dtype).min, x.dtype)
    return lax.reduce_window(x, least, lax.max, *_window(layer))


def _avg_pool(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    lax, jnp = import_module("jax.lax"), import_module("jax.numpy")
    x = _steps(network, layer, given, 0)
    source, out = network.values[layer.inputs[0]], network.values[layer.output]
    if layer.kind == "global_avg_pool2d":
        sums, count = x.sum((2, 3), keepdims=True, dtype=np.int32), x.shape[2] * x.shape[3]
    else:
        if not layer.attributes.get("count_include_pad", True):
            raise refuse(layer, "stablehlo", "an average that leaves its padding out")
        sums = lax.reduce_window(x, np.int32(0), lax.add, *_window(layer))
        count = int(np.prod(as_pair("kernel_size", layer.attributes["kernel_size"], 1)))
    if not network.shift:
        return _rounded(network, layer, sums.astype(np.float32) * np.float32(source.scale / out.scale / count))
    right = _exponent(source.scale) - _exponent(out.scale)
    up, down = max(0, -right), max(0, right)
    if max(up, down) > 12 or count > 2**10:
        raise refuse(layer, "stablehlo", "its scales differ too much for int32, or it averages too many pixels")
    steps = jnp.floor_divide(2 * (sums << up) + (count << down), 2 * (count << down))
    low, high = network.steps(layer)
    return jnp.clip(steps + out.zero_point, low, high).astype(_dtype(out.dtype))


def _flatten(network: Network, layer: Layer, given: list[Any], values: dict[int, Any]) -> Any:
    return given[0].reshape(given[0].shape[0], -1)


_INT8_LAYERS: dict[str, Callable[[Network, Layer, list[Any], dict[int, Any]], Any]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "conv2d": _product,
    "linear": _product,
    "add": _add,
    "concat": _concat,
    "rescale": _concat,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "global_avg_pool2d": _avg_pool,
    "flatten": _flatten,
}


def _steps(network: Network, layer: Layer, given: list[Any], i: int) -> Any:
    return given[i].astype(np.int32) - network.values[layer.inputs[i]].zero_point


def _window(layer: Layer) -> tuple[Any, ...]:
    """Window, strides and padding of a pool, for lax.reduce_window."""
    kernel, stride = (as_pair(n, layer.attributes[n], 1) for n in ("kernel_size", "stride"))
    top, bottom, left, right = as_sides(layer.attributes["padding"])
    return (1, 1, *kernel), (1, 1, *stride), [(0, 0), (0, 0), (top, bottom), (left, right)]


def _exponent(scale: float) -> int:
    return int(1 - np.frexp(scale)[1])


def _dtype(dtype: torch.dtype) -> Any:
    return np.int8 if dtype == torch.int8 else np.uint8


# --- float layers -----------------------------------------------------------------------------------------------------


class _Arguments:
    """The arguments of an ATen operation, values in the place of their numbers."""

    def __init__(self, layer: Layer, values: dict[int, Any], network: Network) -> None:
        self.layer, self.values, self.network = layer, values, network

    def __getitem__(self, name: str) -> Any:
        found = self.layer.attributes[name]
        return self.values[found.value] if isinstance(found, Use) else found

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, without the batch."""
        return self.network.values[self.layer.output].shape[1:]


def _convolution(a: _Arguments) -> Any:
    lax = import_module("jax.lax")
    weight, padding, dilation = a["weight"], a["padding"], _pair(a["dilation"])
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(0, 0)] * 2 if padding == "valid" else [(p, p) for p in _pair(padding)]
    y = lax.conv_general_dilated(a["input"], weight, _pair(a["stride"]), pads, rhs_dilation=dilation,
                                 feature_group_count=a["groups"], precision="highest")  # fmt: skip
    return y if a["bias"] is None else y + a["bias"].reshape(1, -1, 1, 1)


def _linear(a: _Arguments) -> Any:
    from imgopt_fast.jax import masked_matmul

    return masked_matmul(a["input"], a["weight"], None, a["bias"])


def _clamp(a: _Arguments) -> Any:
    low, high = (a[bound] if isinstance(bound, str) else bound for bound in CLAMPS[a.layer.operation])
    return import_module("jax.numpy").clip(a["self"], low, high)


def _pool(largest: bool, a: _Arguments) -> Any:
    lax = import_module("jax.lax")
    if a["ceil_mode"] or (not largest and (a["divisor_override"] or not a["count_include_pad"])):
        raise refuse(a.layer, "stablehlo", "ceil_mode, divisor_override or uncounted padding")
    kernel = _pair(a["kernel_size"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    window = (1, 1, *kernel), (1, 1, *stride), [(0, 0), (0, 0), *((p, p) for p in _pair(a["padding"]))]
    if largest:
        return lax.reduce_window(a["self"], np.float32(-np.inf), lax.max, *window,
                                 window_dilation=(1, 1, *_pair(a["dilation"])))  # fmt: skip
    return lax.reduce_window(a["self"], np.float32(0), lax.add, *window) / np.float32(np.prod(kernel))


def _adaptive_pool(a: _Arguments) -> Any:
    if _pair(a["output_size"]) != [1, 1]:
        raise refuse(a.layer, "stablehlo", "an adaptive pool to more than one pixel")
    return a["self"].mean((2, 3), keepdims=True)


def _joined(a: _Arguments) -> Any:
    parts = [a.values[use.value] for use in a["tensors"]]
    return import_module("jax.numpy").concatenate(parts, a["dim"])


def _call(name: str, a: _Arguments) -> Any:
    """A function of jax.nn on the one tensor."""
    return getattr(import_module("jax.nn"), name)(a["self"])


_FLOAT_LAYERS: dict[Any, Callable[[_Arguments], Any]] = {
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.linear.default: _linear,
    **dict.fromkeys(CLAMPS, _clamp),
    **dict.fromkeys(RESHAPES, lambda a: a["self"].reshape(-1, *a.shape)),
    aten.unsqueeze.default: lambda a: a["self"].reshape(-1, *a.shape),
    aten.sigmoid.default: partial(_call, "sigmoid"),
    aten.tanh.default: partial(_call, "tanh"),
    aten.silu.default: partial(_call, "silu"),
    aten.hardswish.default: partial(_call, "hard_swish"),
    aten.hardsigmoid.default: partial(_call, "hard_sigmoid"),
    aten.add.Tensor: lambda a: a["self"] + a["alpha"] * a["other"],
    aten.sub.Tensor: lambda a: a["self"] - a["alpha"] * a["other"],
    aten.mul.Tensor: lambda a: a["self"] * a["other"],
    aten.div.Tensor: lambda a: a["self"] / a["other"],
    aten.matmul.default: lambda a: import_module("jax.numpy").matmul(a["self"], a["other"], precision="highest"),
    aten.softmax.int: lambda a: import_module("jax.nn").softmax(a["self"], a["dim"]),
    aten.cat.default: _joined,
    aten.max_pool2d.default: partial(_pool, True),
    aten.avg_pool2d.default: partial(_pool, False),
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.mean.dim: lambda a: a["self"].mean(tuple(a["dim"]), keepdims=a["keepdim"]),
    aten.permute.default: lambda a: a["self"].transpose(a["dims"]),
}


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values
