"""int8_conv2d against a plain int64 loop and float32 arithmetic in NumPy: every comparison is for equal bits."""

import ctypes
import itertools
import math
import mmap
import pickle
from pathlib import Path
from typing import Any

import neon_units
import numpy as np
import pytest
import torch
from conftest import BACKEND

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast._prepared import MOST_CALLS
from imgopt_fast.ops import int8_conv2d as op
from imgopt_fast.ops.int8_conv2d import fallback, reference

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


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_integer_oracle(isa: str, rng: np.random.Generator, geometry: dict[str, Any]) -> None:
    for input_dtype, output_dtype in itertools.product(DTYPES, DTYPES):
        out = check(*layer(rng, input_dtype=input_dtype, output_dtype=output_dtype, **geometry))
        assert out.dtype == output_dtype
        assert out.is_contiguous(memory_format=torch.channels_last)


# Paddings on every side and wider than a kernel, images lower and narrower than one, several images to a block.
PADDED: list[dict[str, Any]] = [
    {"c": 32, "o": 64, "h": 7, "w": 7, "n": 3, "padding": ((1, 1), (1, 1))},
    {"c": 8, "o": 20, "h": 14, "w": 15, "padding": ((1, 1), (1, 1)), "stride": (2, 2)},
    {"c": 4, "o": 33, "h": 9, "w": 12, "padding": ((2, 0), (0, 3))},
    {"c": 4, "o": 48, "h": 9, "w": 40, "padding": ((4, 4), (4, 4)), "dilation": (4, 4)},
    {"c": 4, "o": 96, "h": 6, "w": 6, "k": (5, 7), "padding": ((2, 2), (3, 3)), "n": 4},
    {"c": 4, "o": 16, "h": 5, "w": 1, "padding": ((1, 1), (1, 1)), "n": 7},
    {"c": 4, "o": 16, "h": 1, "w": 30, "padding": ((1, 1), (1, 1)), "n": 2},
    {"c": 4, "o": 16, "h": 2, "w": 3, "padding": ((4, 5), (6, 4))},
    {"c": 4, "o": 12, "h": 9, "w": 9, "k": (9, 9), "padding": ((4, 4), (4, 4))},
    {"c": 32, "o": 32, "groups": 4, "h": 8, "w": 20, "padding": ((1, 1), (1, 1))},
    {"c": 32, "o": 80, "k": (1, 1)},
]


@pytest.mark.parametrize("geometry", PADDED, ids=str)
@pytest.mark.parametrize("mode", ["float", "shift", "residual", "plain residual", "real"])
def test_taps_that_meet_padding_are_left_out(
    isa: str, rng: np.random.Generator, geometry: dict[str, Any], mode: str
) -> None:
    """A zero point of 0, or -128 for int8, makes padding vanish from the sums; every epilogue of sorted pixels."""
    for dtype, zero_point in ((torch.uint8, 0), (torch.int8, -128)):
        changes: dict[str, Any] = {"input_zero_point": zero_point, "output_min": 0.0}
        if mode == "real":
            changes |= {"output_scale": None, "output_zero_point": 0, "output_dtype": None}
        shift = {"power_of_two": True, "requantize": "shift"} if mode == "shift" else {}
        with_residual = mode in ("shift", "residual", "plain residual")
        call = layer(rng, input_dtype=dtype, with_residual=with_residual, **geometry, **shift, **changes)
        if mode == "plain residual":  # an output that needs no zero point, with a residual that needs one, or does not
            call[3]["output_zero_point"] = 0
            if dtype == torch.uint8:
                call[3].update(residual=call[3]["residual"].view(torch.uint8), residual_zero_point=0)
        check(*call)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_lanes_and_strips(isa: str, rng: np.random.Generator, kernel: int, stride: int) -> None:
    """Every remainder of a vector's lanes, maps narrower and wider than a strip, odd and even numbers of rows."""
    pad = kernel // 2
    for c, (h, w) in itertools.product((16, 24, 32, 40, 80, 96, 112), ((4, 61), (7, 6), (19, 9))):
        geometry = {"k": (kernel, kernel), "stride": (stride, stride), "padding": ((pad, pad), (pad, pad))}
        check(*layer(rng, n=2, c=c, o=c, groups=c, h=h, w=w, input_dtype=DTYPES[c // 8 % 2], **geometry))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("steps", [0, 7_570_000, 8_090_000, 8_500_000, -8_500_000])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_behind_a_relu(isa: str, rng: np.random.Generator, kernel: int, stride: int, steps: int) -> None:
    """Zero point 0, every remainder of a vector's lanes; sums around 2^23, up to which they may be taken as floats."""
    for c, (h, w) in itertools.product((16, 32, 64, 72, 80, 96, 144), ((5, 33), (6, 4), (2, 1))):
        pad = kernel // 2
        x, weight, _, settings = layer(
            rng, c=c, o=c, groups=c, h=h, w=w, k=(kernel, kernel), stride=(stride, stride),
            padding=((pad, pad), (pad, pad)), output_zero_point=0,
        )  # fmt: skip
        one_step = settings["input_scale"] * settings["weight_scale"]
        settings["output_scale"] *= 1 + abs(steps) / 60_000
        check(x, weight, steps * one_step, settings)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_of_large_images(isa: str, rng: np.random.Generator, kernel: int, stride: int) -> None:
    """More than 1 MiB, where rows are fetched ahead: the result stays what it is."""
    pad = kernel // 2
    geometry = {"k": (kernel, kernel), "stride": (stride, stride), "padding": ((pad, pad), (pad, pad))}
    check(*layer(rng, n=1, c=80, o=80, groups=80, h=13, w=1100, output_zero_point=0, **geometry))


DEPTHWISE_LAYERS: list[dict[str, Any]] = [
    {"c": c, "o": c, "groups": c, "k": (k, k), "stride": (s, s), "padding": ((k // 2,) * 2,) * 2, "w": w}
    for k in (3, 5)
    for c, s, w in ((16, 1, 9), (32, 1, 8), (32, 2, 9), (72, 1, 5), (80, 2, 8), (96, 1, 7))
]


# First layers: windows that hang over either side, images narrower than a window, rows of 1 to 5 dwords and a rest.
FIRST_LAYERS: list[dict[str, Any]] = [
    {"c": c, "o": o, "k": (k, k), "stride": (s, s), "padding": ((p, p), (p, q)), "h": h, "w": w, "n": n}
    for c, o, k, s, p, q, h, w, n in (
        (3, 64, 7, 2, 3, 3, 20, 118, 1),
        (3, 32, 3, 2, 1, 0, 9, 15, 2),
        (3, 16, 3, 1, 1, 1, 5, 4, 3),
        (1, 33, 5, 1, 2, 2, 3, 2, 2),
        (6, 20, 2, 2, 0, 1, 8, 7, 2),
        (2, 70, 3, 3, 0, 0, 10, 31, 1),
        (5, 8, 1, 1, 0, 0, 6, 5, 1),
    )
]


@pytest.mark.parametrize("geometry", FIRST_LAYERS, ids=str)
def test_first_layers(isa: str, rng: np.random.Generator, geometry: dict[str, Any]) -> None:
    for input_dtype in DTYPES:
        check(*layer(rng, input_dtype=input_dtype, **geometry))


@pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")
@pytest.mark.parametrize("geometry", [*FIRST_LAYERS, *GEOMETRIES[1:6], *GEOMETRIES[12:16], *DEPTHWISE_LAYERS], ids=str)
def test_nothing_is_read_behind_the_images(isa: str, rng: np.random.Generator, geometry: dict[str, Any]) -> None:
    """Images that end where a page without access begins: one byte more ends the process."""
    x, weight, bias, settings = layer(rng, **geometry)
    page = mmap.PAGESIZE
    size = -(-x.numel() // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    flat = np.frombuffer(memory, np.uint8, x.numel(), size - x.numel())
    n, c, h, w = x.shape
    guarded = torch.from_numpy(flat).view(n, h, w, c).permute(0, 3, 1, 2)
    guarded.copy_(x)
    check(guarded, weight, bias, settings)


@pytest.mark.parametrize("requantize", ["float", "shift"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogues(isa: str, rng: np.random.Generator, requantize: str, with_residual: bool) -> None:
    """Clamp, residual, float output and shifts, on a wide tile, a tail of channels, and depthwise."""
    shift = requantize == "shift"
    for geometry in ({"c": 64, "o": 64}, {"c": 12, "o": 37}, {"c": 70, "o": 70, "groups": 70}):
        for output_dtype in DTYPES:
            bounds = {"output_min": -1.3, "output_max": 3.7} if output_dtype == torch.int8 else {"output_min": 0.0}
            check(
                *layer(
                    rng, **geometry, output_dtype=output_dtype, with_residual=with_residual, power_of_two=shift,
                    requantize=requantize, **bounds,
                )
            )  # fmt: skip
        plain = {
            "output_zero_point": 0,
            "with_residual": with_residual,
            "power_of_two": shift,
            "requantize": requantize,
        }
        check(*layer(rng, **geometry, **plain))
        check(*layer(rng, **geometry, **plain, output_max=2.9))
        keywords = {"output_scale": None, "output_zero_point": 0, "output_dtype": None, "output_max": 11.5}
        found = check(*layer(rng, **geometry, with_residual=with_residual, power_of_two=shift, **keywords))
        assert found.dtype == torch.float32


@pytest.mark.parametrize("input_dtype", DTYPES)
def test_extreme_values_do_not_saturate_in_16_bits(isa: str, input_dtype: torch.dtype) -> None:
    """All-maximal products: pairs leave int16, which instructions that saturate there get wrong."""
    for weight_value, zero_point in ((127, 0), (-128, 0), (-127, 0), (127, 255), (-128, 255)):
        for c, groups, o in ((64, 1, 64), (20, 1, 33), (6, 1, 5), (64, 64, 64)):
            zero = zero_point - 128 if input_dtype == torch.int8 else zero_point
            value = op.INTEGER_RANGE[input_dtype][1 if zero_point == 0 else 0]
            x = torch.full((1, c, 5, 6), value, dtype=input_dtype)
            weight = torch.full((o, c // groups, 3, 3), weight_value, dtype=torch.int8)
            weight[::2, :, 1:] = -1 - weight_value if weight_value < 0 else -weight_value
            settings = {
                "input_scale": 0.5, "input_zero_point": zero, "weight_scale": torch.full((o,), 0.25),
                "groups": groups, "padding": ((1, 1), (1, 1)),
            }  # fmt: skip
            check(x, weight, None, settings)
            # Sums of a million steps each way: conversion to an integer must not overflow to the wrong side.
            extreme = settings | {"input_scale": 2.0**20, "weight_scale": torch.full((o,), 2.0**20)}
            check(x, weight, None, extreme | {"output_scale": 2.0**-20, "output_dtype": torch.uint8})


def test_large_sums_round_once(isa: str, rng: np.random.Generator) -> None:
    """Above 2^24 a sum is rounded to float32 before it is scaled."""
    x, weight, _, settings = layer(rng, n=1, c=2048, o=32, k=(3, 3), h=4, w=4)
    x.fill_(255)
    weight = (weight.abs() | 64).clamp(max=127).to(torch.int8)
    bias = torch.full((32,), 1e4)
    check(x, weight, bias, settings | {"output_scale": 1e5, "input_zero_point": 1})


def test_memory_formats_and_strides(isa: str, rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, c=8, o=16, with_residual=True)
    expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    wide = torch.zeros(2, 16, 14, 9, dtype=torch.uint8)
    strided = wide[:, ::2, ::2]
    strided.copy_(x)
    for image in (x.contiguous(), strided, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(imgopt_fast.int8_conv2d(image, weight, bias, **settings), expected)
    turned = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert torch.equal(imgopt_fast.int8_conv2d(x, turned, bias, **settings), expected)


@pytest.mark.parametrize("implementation", [reference.int8_conv2d, fallback.int8_conv2d], ids=["reference", "numba"])
def test_python_implementations(implementation: Any, rng: np.random.Generator) -> None:
    """Called directly, so that they are tested whatever backend is chosen."""
    for geometry in GEOMETRIES[:1] + GEOMETRIES[5:21]:
        for shift in (False, True):
            x, weight, bias, settings = layer(rng, **geometry, with_residual=True, power_of_two=shift)
            settings |= {"output_min": -2.0, "requantize": "shift" if shift else "float"}
            expected = oracle(x, weight, bias, **settings)
            packed = imgopt_fast.pack_int8_weight(
                weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
                input_zero_point=settings["input_zero_point"], groups=settings["groups"],
            )  # fmt: skip
            found = implementation(*operation_arguments(x, packed, settings))
            np.testing.assert_array_equal(found.numpy(), expected)


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


def test_numpy_face(rng: np.random.Generator) -> None:
    import imgopt_fast.numpy as face

    for geometry in GEOMETRIES[:1] + GEOMETRIES[5:10]:
        for shift in (False, True):
            x, weight, bias, settings = layer(
                rng, **geometry, with_residual=True, power_of_two=shift, input_dtype=torch.int8
            )
            settings |= {"output_min": -2.0, "requantize": "shift" if shift else "float"}
            expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings).permute(0, 2, 3, 1).numpy()
            settings |= {
                "weight_scale": settings["weight_scale"].numpy(), "output_dtype": "uint8",
                "residual": settings["residual"].permute(0, 2, 3, 1).numpy(),
            }  # fmt: skip
            found = face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), weight.numpy(), bias.numpy(), **settings)
            np.testing.assert_array_equal(found, expected)
            own = ("input_scale", "input_zero_point", "weight_scale", "groups")
            about_weight = {name: settings.pop(name) for name in own}
            packed = face.pack_int8_weight(weight.numpy(), bias=bias.numpy(), **about_weight)
            moved = packed._replace(packed=np.concatenate([packed.packed[:1], packed.packed])[1:])  # not aligned
            for layer_weight in (packed, packed, pickle.loads(pickle.dumps(packed)), moved):
                found = face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), layer_weight, **settings)
                np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="weight: is packed"):
        face.int8_conv2d(x.permute(0, 2, 3, 1).numpy(), packed, groups=2)
    image = np.zeros((1, 2, 2, 4), np.uint8)
    kernel = np.ones((3, 4, 1, 1), np.int8)
    assert face.int8_conv2d(image, kernel, input_scale=1.0, weight_scale=1.0).dtype == np.float32
    with pytest.raises(ValueError, match=r"weight_scale: .* output channel 1"):
        face.int8_conv2d(image, kernel, input_scale=1.0, weight_scale=np.array([1.0, 0.0, 1.0]))
    with pytest.raises(TypeError, match="input: expected a uint8 or int8 array"):
        face.int8_conv2d(image.astype(np.int32), kernel, input_scale=1.0, weight_scale=1.0)


def test_threads_do_not_change_bits(rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, n=3, c=64, o=128, h=30, w=31)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(imgopt_fast.int8_conv2d(x, weight, bias, **settings))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_packed_weight_of_another_isa_is_packed_anew(isa: str, rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, c=32, o=48)
    expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    own = ("input_scale", "input_zero_point", "weight_scale", "groups")
    rest = {name: value for name, value in settings.items() if name not in own}
    packed = imgopt_fast.pack_int8_weight(
        weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
        input_zero_point=settings["input_zero_point"],
    )  # fmt: skip
    packed = pickle.loads(pickle.dumps(packed))
    assert packed.packed.numel() > weight.numel()
    for other in _native.supported_isas():
        _native.set_isa(other)
        assert torch.equal(imgopt_fast.int8_conv2d(x, packed, **rest), expected)
    truncated = packed._replace(packed=packed.packed[:-1].clone())
    assert torch.equal(imgopt_fast.int8_conv2d(x, truncated, **rest), expected)


def test_opcheck_compile_and_export(rng: np.random.Generator) -> None:
    x, weight, bias, settings = layer(rng, c=8, o=16, with_residual=True)
    packed = imgopt_fast.pack_int8_weight(
        weight, settings["weight_scale"], bias, input_scale=settings["input_scale"],
        input_zero_point=settings["input_zero_point"],
    )  # fmt: skip
    arguments = operation_arguments(x, packed, settings)
    torch.library.opcheck(torch.ops.imgopt_fast.int8_conv2d.default, arguments)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = imgopt_fast.int8_conv2d(x, packed, output_scale=0.7, output_zero_point=9, padding=(1, 2), stride=2)
            return imgopt_fast.int8_conv2d(  # unpacked: the checks of values are left out while tracing
                y, weight.view(8, 16, 3, 3), input_scale=0.7, input_zero_point=9, weight_scale=0.5
            )

    expected = Layer()(x)
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    exported = torch.export.export(Layer(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    more = torch.cat([x, x.flip(0)])
    assert torch.equal(exported.module()(more), Layer()(more))


def test_a_call_that_was_made_before_is_found_by_all_of_its_arguments(rng: np.random.Generator) -> None:
    """Calls that differ in one argument, twice in turns, each against the unpacked weight, which remembers nothing."""
    x, weight, bias, _ = layer(rng, c=8, o=16, h=9, w=9)
    own = {"input_scale": 0.25, "input_zero_point": 3, "weight_scale": 2.0**-6}
    packed = imgopt_fast.pack_int8_weight(weight, own["weight_scale"], bias, input_scale=0.25, input_zero_point=3)
    usual: dict[str, Any] = {"output_scale": 1.0, "padding": 1}
    extra = {"residual_scale": 0.5, "residual": random_bytes(rng, (2, 16, 9, 9), torch.uint8)}
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (x, usual),
        (random_bytes(rng, (1, 8, 5, 6), torch.uint8), usual),
        (random_bytes(rng, (2, 8, 9, 9), torch.int8), usual),
        *((x, usual | change) for change in (
            {"output_scale": 0.5}, {"output_scale": None}, {"output_zero_point": 7}, {"output_dtype": torch.int8},
            {"stride": 2}, {"stride": [2, 1]}, {"padding": 0}, {"padding": ((1, 0), (2, 1))}, {"dilation": (1, 2)},
            {"output_min": 0.5}, {"output_max": 4.0}, {"requantize": "shift"}, extra,
            extra | {"residual_scale": 2.0}, extra | {"residual_zero_point": 9},
            extra | {"residual": extra["residual"].view(torch.int8)}, extra | {"requantize": "shift"},
        )),
    ]  # fmt: skip
    expected = [imgopt_fast.int8_conv2d(images, weight, bias, **own, **call) for images, call in calls]
    for _ in range(2):
        for (images, call), right in zip(calls, expected, strict=True):
            found = imgopt_fast.int8_conv2d(images, packed, **call)
            assert found.dtype == right.dtype
            assert torch.equal(found, right), call


@pytest.mark.skipif(BACKEND != "native", reason="only the compiled kernels prepare calls")
def test_prepared_calls_live_as_long_as_the_packed_weight(rng: np.random.Generator) -> None:
    x, weight, bias, _ = layer(rng, c=8, o=16)
    packed = imgopt_fast.pack_int8_weight(weight, 0.5, bias, input_scale=0.25)
    layers, number = op._CALLS._layers, id(packed.packed)
    for scale in range(1, 40):
        imgopt_fast.int8_conv2d(x, packed, output_scale=float(scale))
    assert 0 < len(layers[number].calls) <= MOST_CALLS
    # Another layer with the same packed bytes is another layer.
    other = packed._replace(bias=packed.bias + 100)
    for _ in range(2):
        assert torch.equal(imgopt_fast.int8_conv2d(x, other), imgopt_fast.int8_conv2d(x, packed) + 100 * 0.125)
    del packed, other
    assert number not in layers


def test_errors_of_a_call_that_was_made_before() -> None:
    packed = imgopt_fast.pack_int8_weight(torch.ones(4, 8, 3, 3, dtype=torch.int8), 0.5, input_scale=0.5)
    x = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    residual = torch.zeros(1, 4, 3, 3, dtype=torch.uint8)
    given = {"output_scale": 1.0, "residual": residual, "residual_scale": 1.0}
    for _ in range(2):
        imgopt_fast.int8_conv2d(x, packed, output_scale=1.0)
        imgopt_fast.int8_conv2d(x, packed, **given)
        with pytest.raises(ValueError, match="input: expected at least 3 rows"):
            imgopt_fast.int8_conv2d(x[:, :, :2], packed, output_scale=1.0)
        with pytest.raises(ValueError, match=r"input: expected \(N, 8, H, W\)"):
            imgopt_fast.int8_conv2d(x[:, :7], packed, output_scale=1.0)
        with pytest.raises(ValueError, match=r"input: expected \(N, 8, H, W\)"):
            imgopt_fast.int8_conv2d(x[0], packed, output_scale=1.0)
        with pytest.raises(ValueError, match="residual: expected the output's shape"):
            imgopt_fast.int8_conv2d(x, packed, **given | {"residual": residual[:, :, :2]})
        with pytest.raises(ValueError, match="weight: is packed, so bias"):
            imgopt_fast.int8_conv2d(x, packed, output_scale=1.0, input_scale=0.5)


@pytest.mark.skipif(BACKEND != "native", reason="the operation has compiled kernels only")
def test_prepared_bytes_of_another_origin_are_refused(rng: np.random.Generator) -> None:
    x, weight, bias, _ = layer(rng, c=8, o=16)
    packed = imgopt_fast.pack_int8_weight(weight, 0.5, bias, input_scale=0.25)
    imgopt_fast.int8_conv2d(x, packed)
    (call,) = op._CALLS._layers[id(packed.packed)].calls.values()
    run = torch.ops.imgopt_fast.int8_conv2d_prepared
    run(x, packed.packed, call, None)
    longer = torch.cat([call, call[:64]])
    for broken in (call[:100], call[:-64], longer, longer[8:-56], torch.zeros_like(call), call.float()):
        with pytest.raises(RuntimeError, match="prepared"):
            run(x, packed.packed, broken, None)
    for at in range(16, 120, 8):  # geometry: a huge or negative number in every place
        for value in (-1, 2**40):
            broken = call.clone()
            broken[at : at + 8].view(torch.int64)[0] = value
            with pytest.raises(RuntimeError, match=r"prepared|packed"):
                run(x, packed.packed, broken, None)
    with pytest.raises(RuntimeError, match="packed"):
        run(x, packed.packed[:-1], call, None)
    with pytest.raises(RuntimeError, match="residual"):
        run(x, packed.packed, call, x)


GOOD: dict[str, Any] = {"input_scale": 0.5, "weight_scale": 0.5, "output_scale": 1.0}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "input: expected uint8 or int8, got torch.float32", {"input": torch.zeros(1, 8, 5, 5)}),
        (ValueError, r"input: expected \(N, 8, H, W\)", {"input": torch.zeros(1, 7, 5, 5, dtype=torch.uint8)}),
        (ValueError, "input: expected at least 3 rows", {"input": torch.zeros(1, 8, 2, 5, dtype=torch.uint8)}),
        (TypeError, "weight: expected an int8 tensor", {"weight": torch.zeros(4, 8, 3, 3)}),
        (ValueError, "weight: expected .O, C/groups", {"weight": torch.zeros(8, 3, 3, dtype=torch.int8)}),
        (ValueError, "groups: expected a divisor of the 4", {"groups": 3}),
        (ValueError, "weight_scale: .* got -1.0 for output channel 2", {"weight_scale": torch.tensor([1.0, 1, -1, 1])}),
        (ValueError, "weight_scale: expected 1 or 4 numbers", {"weight_scale": torch.ones(3)}),
        (ValueError, "weight_scale: .* inf", {"weight_scale": torch.tensor([1.0, 1, 1, math.inf])}),
        (ValueError, "input_scale: expected a positive finite", {"input_scale": 0.0}),
        (ValueError, "input_scale: expected a positive finite", {"input_scale": math.nan}),
        (ValueError, "output_scale: expected a positive finite", {"output_scale": math.inf}),
        (ValueError, r"input_zero_point: expected an integer in \[0, 255\], got -1", {"input_zero_point": -1}),
        (ValueError, "output_zero_point: expected an integer", {"output_zero_point": 256}),
        (ValueError, "output_dtype: expected", {"output_dtype": torch.float16}),
        (ValueError, "stride: expected", {"stride": 0}),
        (ValueError, "padding: expected", {"padding": (1, 2, 3)}),
        (ValueError, "dilation: expected", {"dilation": (1, -1)}),
        (ValueError, "output_min: expected at most", {"output_min": 2.0, "output_max": 1.0}),
        (ValueError, "output_max: expected a number", {"output_max": math.nan}),
        (ValueError, "residual_scale: expected", {"residual": torch.zeros(1, 4, 3, 3, dtype=torch.uint8)}),
        (ValueError, "residual: expected a tensor", {"residual_scale": 1.0}),
        (
            ValueError,
            "residual: expected the output's shape",
            {"residual": torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "residual_scale": 1.0},
        ),
        (ValueError, "bias: .* output channel 1 .* int32", {"bias": torch.tensor([0.0, 1e10, 0, 0])}),
        (ValueError, "bias: .* output channel 3", {"bias": torch.tensor([0.0, 0, 0, math.nan])}),
        (TypeError, "bias: expected floats", {"bias": torch.zeros(4, dtype=torch.int32)}),
        (ValueError, r"bias: expected \(4,\)", {"bias": torch.zeros(5)}),
        (ValueError, "requantize: expected", {"requantize": "round"}),
        (ValueError, "output_scale: expected a power of two", {"requantize": "shift", "output_scale": 3.0}),
        (
            ValueError,
            "weight_scale: .* output channel 1",
            {"requantize": "shift", "weight_scale": torch.tensor([1.0, 0.3, 1, 1])},
        ),
    ],
)
def test_errors_name_the_argument(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    settings = GOOD | {
        "input": torch.zeros(1, 8, 5, 5, dtype=torch.uint8),
        "weight": torch.ones(4, 8, 3, 3, dtype=torch.int8),
    }
    with pytest.raises(error, match=message):
        imgopt_fast.int8_conv2d(**settings | changes)


def test_sums_that_could_overflow_are_refused() -> None:
    """The bound of kernels.h, on both sides of its edge."""
    weight = torch.full((2, 66_000, 1, 1), 127, dtype=torch.int8)
    imgopt_fast.pack_int8_weight(weight, 1.0, input_scale=1.0)
    weight[1] = -128
    with pytest.raises(ValueError, match="output channel 1"):
        imgopt_fast.pack_int8_weight(weight, 1.0, input_scale=1.0)
    limit = weight[:1, :8].contiguous()
    edge = float(2**31 - 1 - 127 * 8 * 255)
    imgopt_fast.pack_int8_weight(limit, 1.0, torch.tensor([edge], dtype=torch.float64), input_scale=1.0)
    with pytest.raises(ValueError, match="output channel 0"):
        imgopt_fast.pack_int8_weight(limit, 1.0, torch.tensor([edge + 1], dtype=torch.float64), input_scale=1.0)


def test_packed_weight_refuses_its_own_arguments() -> None:
    packed = imgopt_fast.pack_int8_weight(torch.ones(4, 8, 3, 3, dtype=torch.int8), 0.5, input_scale=0.5)
    x = torch.zeros(1, 8, 5, 5, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight: is packed"):
        imgopt_fast.int8_conv2d(x, packed, input_scale=0.5, output_scale=1.0)
    with pytest.raises(ValueError, match="input_zero_point"):
        imgopt_fast.int8_conv2d(x, packed._replace(input_zero_point=-3), output_scale=1.0)


@pytest.mark.skipif(BACKEND != "native", reason="peers are compared with the kernels")
@pytest.mark.filterwarnings("ignore:torch.quantize_per")  # torch warns that its own quantized tensors are old
def test_agrees_with_torch_quantized(rng: np.random.Generator) -> None:
    """torch's own quantized convolution, whose bias and rounding differ by at most one step."""
    x, weight, bias, settings = layer(rng, c=16, o=32, h=9, w=9)
    weight.clamp_(-63, 63)  # fbgemm without VNNI saturates beyond seven bits
    scale = settings["weight_scale"]
    quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(32, dtype=torch.long), 0)
    packed = torch.ops.quantized.conv2d_prepack(quantized, bias, [1, 1], [1, 1], [1, 1], 1)
    image = torch._make_per_tensor_quantized_tensor(x, settings["input_scale"], settings["input_zero_point"])
    theirs = torch.ops.quantized.conv2d(image, packed, settings["output_scale"], settings["output_zero_point"])
    ours = imgopt_fast.int8_conv2d(x, weight, bias, padding=1, **settings)
    assert (ours.int() - theirs.int_repr().int()).abs().max() <= 1


def test_neon_unit_in_an_emulator(tmp_path: Path) -> None:
    assert neon_units.compared("int8_conv2d", tmp_path) == "130 cases, 0 differ\n"
