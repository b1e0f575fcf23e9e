"""Layers for the tests of int8_conv2d, and what they must come to: int64 loops and float32 arithmetic in NumPy."""

import itertools
import math
from typing import Any

import numpy as np
import torch

import imgopt_fast
from imgopt_fast.ops import int8_conv2d as op

DTYPES = (torch.uint8, torch.int8)
F32 = np.float32


def oracle(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    input_scale: float,
    input_zero_point: int,
    weight_scale: torch.Tensor,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    output_dtype: torch.dtype | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    output_min: float | None = None,
    output_max: float | None = None,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    requantize: str = "float",
) -> np.ndarray:
    """The contract in NumPy, written independently of the package: int64 sums tap by tap, then float32."""
    x = input.numpy().astype(np.int64) - input_zero_point
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    w = weight.numpy().astype(np.int64)
    scale = weight_scale.numpy().astype(np.float64)
    outputs, group_channels, kernel_h, kernel_w = w.shape
    height = (x.shape[2] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    sums = np.zeros((x.shape[0], outputs, height, width), np.int64)
    per_group = outputs // groups
    for g, ky, kx in itertools.product(range(groups), range(kernel_h), range(kernel_w)):
        top, left = ky * dilation[0], kx * dilation[1]
        rows = slice(top, top + (height - 1) * stride[0] + 1, stride[0])
        columns = slice(left, left + (width - 1) * stride[1] + 1, stride[1])
        part = x[:, g * group_channels : (g + 1) * group_channels, rows, columns]
        mine = slice(g * per_group, (g + 1) * per_group)
        sums[:, mine] += np.einsum("nchw,oc->nohw", part, w[mine, :, ky, kx])
    if bias is not None:
        steps = np.rint(bias.numpy().astype(np.float64) / (input_scale * scale)).astype(np.int64)
        sums += steps[:, None, None]
    assert np.abs(sums).max(initial=0) < 2**31
    difference = 0 if residual is None else residual.numpy().astype(np.int64) - residual_zero_point
    unit = output_scale or 1.0
    if output_scale is None:
        low, high, zero = -np.inf, np.inf, 0
    else:
        info = np.iinfo(np.uint8 if output_dtype == torch.uint8 else np.int8)
        low, high, zero = info.min - output_zero_point, info.max - output_zero_point, output_zero_point
    low = low if output_min is None else np.clip(F32(output_min / unit), low, high)
    high = high if output_max is None else np.clip(F32(output_max / unit), low, high)
    if requantize == "shift" and output_scale is not None:
        fine = -np.log2(input_scale * scale).astype(np.int64)[:, None, None]
        finest = fine if residual is None else np.maximum(fine, -int(math.log2(residual_scale)))
        total = sums * 2 ** (finest - fine)
        if residual is not None:
            total = total + difference * 2 ** (finest + int(math.log2(residual_scale)))
        right = finest + int(math.log2(output_scale))
        exact = np.vectorize(lambda t, r: (int(t) * 2 ** max(-r, 0) * 2 + 2 ** max(r, 0)) // 2 ** (max(r, 0) + 1))
        right = np.broadcast_to(right, total.shape)
        steps = exact(total, right) if total.size else total
        return np.clip(steps, int(np.rint(low)), int(np.rint(high))) + zero
    y = sums.astype(F32) * (input_scale * scale / unit).astype(F32)[:, None, None]
    if residual is not None:
        y = y + difference.astype(F32) * F32(residual_scale / unit)
    y = np.minimum(np.maximum(y, F32(low)), F32(high))
    return y if output_scale is None else np.rint(y).astype(np.int64) + zero


def random_bytes(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    low, high = op.INTEGER_RANGE[dtype]
    return torch.from_numpy(rng.integers(low, high + 1, shape)).to(dtype)


def layer(
    rng: np.random.Generator,
    *,
    n: int = 2,
    c: int = 8,
    h: int = 7,
    w: int = 9,
    o: int = 16,
    k: tuple[int, int] = (3, 3),
    groups: int = 1,
    input_dtype: torch.dtype = torch.uint8,
    output_dtype: torch.dtype = torch.uint8,
    with_residual: bool = False,
    power_of_two: bool = False,
    **keywords: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Random operands whose outputs fill the range of the output's dtype, all numbers distinct."""
    x = random_bytes(rng, (n, c, h, w), input_dtype)
    weight = random_bytes(rng, (o, c // groups, *k), torch.int8)
    size = weight[0].numel()
    scale = torch.from_numpy(rng.uniform(0.003, 0.02, o).astype(F32))
    settings: dict[str, Any] = {
        "input_scale": 0.037,
        "input_zero_point": 113 if input_dtype == torch.uint8 else -17,
        "weight_scale": scale,
        "output_scale": 0.041 * math.sqrt(size),
        "output_zero_point": 101 if output_dtype == torch.uint8 else 5,
        "output_dtype": output_dtype,
        "groups": groups,
    }
    if power_of_two:
        settings["weight_scale"] = torch.exp2(torch.from_numpy(rng.integers(-9, -4, o))).float()
        settings |= {"input_scale": 2.0**-5, "output_scale": 2.0 ** round(math.log2(0.04 * math.sqrt(size)))}
    settings |= keywords
    if with_residual:
        y = op.output_size(
            x.shape, weight.shape, settings.get("stride", (1, 1)),
            [side for axis in settings.get("padding", ((0, 0), (0, 0))) for side in axis],
            settings.get("dilation", (1, 1)),
        )  # fmt: skip
        settings["residual"] = random_bytes(rng, tuple(y), torch.int8)
        settings["residual_zero_point"] = -29
        settings["residual_scale"] = 2.0**-4 if power_of_two else 0.057
    bias = torch.from_numpy(rng.normal(0, 3, o).astype(F32))
    return x.to(memory_format=torch.channels_last), weight, bias, settings


def check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: dict[str, Any]) -> torch.Tensor:
    """Public function, packed and unpacked, against the oracle."""
    expected = oracle(x, weight, bias, **settings)
    found = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    np.testing.assert_array_equal(found.numpy(), expected)
    own = ("input_scale", "input_zero_point", "weight_scale", "groups")
    packed = imgopt_fast.pack_int8_weight(
        weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
        input_zero_point=settings["input_zero_point"], groups=settings.get("groups", 1),
    )  # fmt: skip
    rest = {name: value for name, value in settings.items() if name not in own}
    for _ in range(2):  # the second call finds what the first one prepared
        np.testing.assert_array_equal(imgopt_fast.int8_conv2d(x, packed, **rest).numpy(), expected)
    return found


# Channels around every tile edge of the kernels, odd sizes, grouped and depthwise with and without multiplier.
GEOMETRIES: list[dict[str, Any]] = [
    {"c": 3, "o": 5, "k": (7, 7), "stride": (2, 2), "padding": ((3, 3), (3, 3)), "h": 23, "w": 21},
    {"c": 64, "o": 64, "padding": ((1, 1), (1, 1))},
    {"c": 4, "o": 17, "k": (1, 1)},
    {"c": 32, "o": 80, "k": (1, 1), "h": 5, "w": 5, "n": 1},
    {"c": 36, "o": 48, "k": (1, 1), "stride": (2, 2)},
    {"c": 5, "o": 33, "k": (3, 1), "padding": ((2, 0), (0, 1)), "stride": (1, 2), "dilation": (2, 1)},
    {"c": 1, "o": 1, "k": (1, 1), "h": 1, "w": 1, "n": 1},
    {"c": 12, "o": 130, "k": (2, 3), "dilation": (3, 2), "padding": ((3, 1), (2, 4)), "h": 8, "w": 6},
    {"c": 16, "o": 16, "k": (3, 3), "h": 1, "w": 1, "padding": ((1, 1), (1, 1))},
    {"c": 16, "o": 24, "groups": 4, "padding": ((1, 1), (1, 1))},
    {"c": 128, "o": 128, "groups": 2, "h": 3, "w": 4},
    {"c": 15, "o": 6, "groups": 3},
    {"c": 64, "o": 64, "groups": 64, "padding": ((1, 1), (1, 1))},
    {"c": 67, "o": 67, "groups": 67, "padding": ((1, 0), (0, 1)), "stride": (2, 2), "h": 11, "w": 13},
    {"c": 96, "o": 96, "groups": 96, "k": (5, 5), "padding": ((2, 2), (2, 2)), "h": 9, "w": 9},
    {"c": 144, "o": 144, "groups": 144, "k": (5, 5), "padding": ((2, 1), (1, 2)), "stride": (2, 2)},
    {"c": 20, "o": 60, "groups": 20, "dilation": (2, 3), "padding": ((2, 2), (3, 3))},
    {"c": 7, "o": 7, "groups": 7, "k": (1, 4), "h": 3, "w": 17},
    {"c": 8, "o": 8, "groups": 8, "k": (1, 1)},
    {"c": 300, "o": 20, "k": (1, 1), "h": 1, "w": 1, "n": 3},
    {"n": 0},
    {"c": 256, "o": 256, "k": (3, 3), "h": 7, "w": 7, "n": 1, "padding": ((1, 1), (1, 1))},
]


def operation_arguments(x: torch.Tensor, packed: Any, settings: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of the schema."""
    (top, bottom), (left, right) = settings.get("padding", ((0, 0), (0, 0)))
    return (
        x, packed.weight, packed.bias, packed.weight_scale, packed.packed, settings.get("residual"),
        packed.input_scale, packed.input_zero_point, settings["output_scale"], settings["output_zero_point"],
        settings["output_dtype"], list(settings.get("stride", (1, 1))), [top, bottom, left, right],
        list(settings.get("dilation", (1, 1))), packed.groups, settings.get("output_min"), settings.get("output_max"),
        settings.get("residual_scale", 1.0), settings.get("residual_zero_point", 0),
        settings.get("requantize") == "shift",
    )  # fmt: skip
