"""Convolutions and products with whatever weights an ONNX model has.

Weights of any zero point are taken: a difference that leaves int8 is split in two halves, over twice the channels.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgopt_fast.ops.int8_graph import Int8GraphBuilder

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scale:
    """Quantization of a tensor of stored integers."""

    scale: float
    zero_point: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Target:
    """What becomes of an operation's result: its clamp in real units, and its quantization or float32."""

    scale: Scale | None = None
    low: float | None = None
    high: float | None = None

    def clamped(self, low: float | None, high: float | None) -> "Target":
        """The same behind one more clamp, which acts first."""
        lows, highs = [v for v in (low, self.low) if v is not None], [v for v in (high, self.high) if v is not None]
        return replace(self, low=max(lows, default=None), high=min(highs, default=None))

    def arguments(self) -> dict[str, Any]:
        """For a method of the builder that clamps."""
        if self.scale is None:
            return {"output_scale": None, "output_min": self.low, "output_max": self.high}
        return self.quantization() | {"output_min": self.low, "output_max": self.high}

    def quantization(self) -> dict[str, Any]:
        """For a method of the builder that does not."""
        assert self.scale is not None
        scale, zero_point, dtype = self.scale.scale, self.scale.zero_point, self.scale.dtype
        return {"output_scale": scale, "output_zero_point": zero_point, "output_dtype": dtype}


@dataclass(frozen=True)
class Weights:
    """stored - zero point, as int64; a scale for each output or one; a bias for each output, in real units."""

    steps: Array
    scale: Array
    bias: Array | None = None

    def arguments(self, steps: Array) -> tuple[Tensor, Tensor, Tensor | None]:
        """For a method of the builder, with `steps` in the place of the own ones."""
        bias = None if self.bias is None else torch.from_numpy(_flat(self.bias, np.float64))
        weight = torch.from_numpy(np.ascontiguousarray(steps.astype(np.int8)))
        return weight, torch.from_numpy(_flat(self.scale, np.float32)), bias


def convolve(
    builder: Int8GraphBuilder, x: int, weights: Weights, target: Target, window: dict[str, Any], residual: int | None
) -> int:
    """`window`: stride, padding, dilation and groups as the builder's `conv2d` takes them."""
    steps, window = weights.steps, dict(window)
    if not _fits(steps):
        if window["groups"] > 1:
            steps, window["groups"] = _dense(steps, window["groups"]), 1
        x, steps = _split(builder, x, steps)
    arguments = target.arguments() | window
    return builder.conv2d(x, *weights.arguments(steps), residual=residual, **arguments)


def multiply(builder: Int8GraphBuilder, x: int, weights: Weights, target: Target, residual: int | None = None) -> int:
    """`x` (N, K) times the weights (O, K)."""
    steps = weights.steps
    if not _fits(steps):
        x, steps = _split(builder, x, steps)
    return builder.linear(x, *weights.arguments(steps), residual=residual, **target.arguments())


def centred(stored: Array, zero: Array, axis: int) -> Array:
    """stored - zero point, the zero points along `axis` where there are several."""
    zero = np.asarray(zero, np.int64).reshape(-1)
    shape = [1] * stored.ndim
    if zero.size > 1:
        shape[axis] = zero.size
    return np.asarray(stored.astype(np.int64) - (zero.reshape(shape) if stored.ndim else zero[0]))


def block_diagonal(stack: Array) -> Array:
    """(B·M, B·N) of a stack (B, M, N)."""
    count, rows, columns = stack.shape
    whole = np.zeros((count, rows, count, columns), np.int64)
    for i in range(count):
        whole[i, :, i] = stack[i]
    return whole.reshape(count * rows, count * columns)


def _fits(steps: Array) -> bool:
    return bool(steps.size == 0 or (steps.min() >= -128 and steps.max() <= 127))


def _split(builder: Int8GraphBuilder, x: int, steps: Array) -> tuple[int, Array]:
    """The same sums with weights that fit into int8: x·w = x·(w/2) + x·(w - w/2)."""
    half, given = steps // 2, builder.value(x)
    doubled = builder.concat(
        [x, x], output_scale=given.scale, output_zero_point=given.zero_point, output_dtype=given.dtype
    )
    return doubled, np.concatenate([half, steps - half], 1)


def _dense(steps: Array, groups: int) -> Array:
    """A grouped weight with the zeros that it leaves out."""
    outputs, inputs = len(steps) // groups, steps.shape[1]
    whole = np.zeros((len(steps), inputs * groups, *steps.shape[2:]), np.int64)
    for g in range(groups):
        rows = slice(g * outputs, (g + 1) * outputs)
        whole[rows, g * inputs : (g + 1) * inputs] = steps[rows]
    return whole


def _flat(values: Array, dtype: Any) -> Array:
    return np.ascontiguousarray(values.astype(dtype).reshape(-1))
