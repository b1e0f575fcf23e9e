"""int8_conv2d against a plain int64 loop and float32 arithmetic in NumPy: every comparison is for equal bits."""

import ctypes
import itertools
import mmap
from pathlib import Path
from typing import Any

import neon_units
import numpy as np
import pytest
import torch
from conftest import BACKEND
from conv_problems import DTYPES, GEOMETRIES, check, layer, operation_arguments, oracle, random_bytes

import imgopt_fast
from imgopt_fast.ops import int8_conv2d as op
from imgopt_fast.ops.int8_conv2d import fallback, reference


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
    """Zero point 0, every remainder of a vector's lanes; sums around 2^23, beyond which float32 rounds them."""
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
    """More than 6 MiB, with 5 x 5 taps 1 MiB, where rows are fetched ahead: the result stays what it is."""
    pad, width = kernel // 2, 5000 if kernel == 3 else 1100
    geometry = {"k": (kernel, kernel), "stride": (stride, stride), "padding": ((pad, pad), (pad, pad))}
    check(*layer(rng, n=1, c=80, o=80, groups=80, h=13, w=width, output_zero_point=0, **geometry))


# Paddings that a row of outputs begins or ends with entirely, of one side only, and none.
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((4, 5), (6, 7)), ((0, 2), (3, 0)), ((2, 0), (0, 9))], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_paddings(isa: str, rng: np.random.Generator, kernel: int, stride: int, padding: Any) -> None:
    for c, (h, w) in itertools.product((64, 80), ((5, 5), (7, 34))):
        geometry = {"k": (kernel, kernel), "stride": (stride, stride), "padding": padding}
        check(*layer(rng, c=c, o=c, groups=c, h=h, w=w, **geometry))


# Light weights, of which any two products fit 16 bits with the right partners; some that do not; none.
@pytest.mark.parametrize("deviation", [10, 40, 1000])
@pytest.mark.parametrize("input_dtype", DTYPES)
def test_products_that_are_added_in_16_bits(
    isa: str, rng: np.random.Generator, deviation: float, input_dtype: torch.dtype
) -> None:
    geometries: tuple[dict[str, Any], ...] = (
        {"c": 48, "o": 32, "padding": ((1, 1), (1, 1))},
        {"c": 64, "o": 96, "groups": 2, "input_zero_point": 0, "padding": ((1, 2), (0, 1))},
        {"c": 528, "o": 16, "k": (1, 1)},
    )
    for geometry in geometries:
        real = {"output_scale": None, "output_zero_point": 0, "output_dtype": None}
        x, weight, bias, settings = layer(rng, input_dtype=input_dtype, **geometry, **real)
        weight = torch.from_numpy(rng.normal(0, deviation, weight.shape).round().clip(-128, 127)).to(torch.int8)
        weight[:16, :16, 0, 0] = 127
        weight[1, :16, 0, 0] = -128
        weight[2, 16:32, 0, 0] = 65  # a pair of these is the least that does not fit, as is one of the next
        weight[3, 16:32, -1, -1] = -65
        x[:, :, ::2] = 255 if input_dtype == torch.uint8 else 127
        check(x, weight, bias, settings)


DEPTHWISE_LAYERS: list[dict[str, Any]] = [
    {"c": c, "o": c, "groups": c, "k": (k, k), "stride": (s, s), "padding": ((k // 2,) * 2,) * 2, "w": w}
    for k in (3, 5)
    for c, s, w in ((16, 1, 9), (32, 1, 8), (32, 2, 9), (72, 1, 5), (80, 2, 8), (96, 1, 7))
]


# First layers: windows that hang over either side, images narrower than a window, rows of 1 to 5 dwords and a rest,
# images of several bands of rows, pixels 1 to 12 bytes apart.
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
        (3, 20, 11, 4, 2, 5, 19, 9, 2),
        (3, 24, 7, 2, 3, 3, 61, 99, 2),
        (3, 64, 7, 3, 3, 0, 40, 130, 2),
        (1, 17, 9, 2, 4, 4, 30, 70, 1),
        (3, 20, 11, 4, 2, 2, 30, 75, 1),
    )
]
FIRST_LAYERS += [
    {"c": 3, "o": 64, "k": (3, 7), "dilation": (2, 1), "padding": ((4, 1), (2, 5)), "h": 6, "w": 8},
    {"c": 3, "o": 64, "k": (3, 7), "dilation": (1, 2), "padding": ((1, 1), (6, 5)), "h": 6, "w": 8},
]


@pytest.mark.parametrize("filters", [8, 16, 24, 32, 40, 48, 64, 96])
def test_pointwise_layers(isa: str, rng: np.random.Generator, filters: int) -> None:
    """1 x 1: every height of a tile, one block of pixels and several, dense rows and rows with a rest."""
    for c, w in itertools.product((4, 20), (1, 5, 11, 23, 24, 25, 50, 127)):
        for output_zero_point in (0, 9):
            check(
                *layer(rng, n=1 + w // 50 * 3, c=c, o=filters, k=(1, 1), h=1, w=w, output_zero_point=output_zero_point)
            )


@pytest.mark.parametrize("geometry", FIRST_LAYERS, ids=str)
def test_first_layers(isa: str, rng: np.random.Generator, geometry: dict[str, Any]) -> None:
    for input_dtype in DTYPES:
        check(*layer(rng, input_dtype=input_dtype, **geometry))


def before_a_gap(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x`, channels_last, that ends where a page without access begins: one byte more ends the process."""
    page = mmap.PAGESIZE
    size = -(-x.numel() // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    flat = np.frombuffer(memory, np.uint8, x.numel(), size - x.numel())
    n, c, h, w = x.shape
    return torch.from_numpy(flat).view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)


needs_mprotect = pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect")


@needs_mprotect
@pytest.mark.parametrize("geometry", [*FIRST_LAYERS, *GEOMETRIES[1:6], *GEOMETRIES[12:16], *DEPTHWISE_LAYERS], ids=str)
def test_nothing_is_read_behind_the_images(isa: str, rng: np.random.Generator, geometry: dict[str, Any]) -> None:
    x, weight, bias, settings = layer(rng, **geometry)
    check(before_a_gap(x), weight, bias, settings)


@needs_mprotect
@pytest.mark.parametrize("channels", [16, 20, 40, 48, 64, 72, 96, 256])
def test_residuals_behind_a_relu(isa: str, rng: np.random.Generator, channels: int) -> None:
    """uint8 with zero point 0, as in residual networks, in 1 x 1 and 3 x 3 layers; nothing is read behind them."""
    for k, zero_point in (((1, 1), 113), ((3, 3), 113), ((3, 3), 0)):
        edge = k[0] // 2
        x, weight, bias, settings = layer(
            rng, n=1, c=12, o=channels, k=k, padding=((edge, edge), (edge, edge)), output_zero_point=0, output_min=0.0,
            input_zero_point=zero_point,
        )  # fmt: skip
        residual = before_a_gap(random_bytes(rng, (1, channels, 7, 9), torch.uint8))
        check(x, weight, bias, settings | {"residual": residual, "residual_scale": 0.057})


@pytest.mark.parametrize("requantize", ["float", "shift"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_epilogues(isa: str, rng: np.random.Generator, requantize: str, with_residual: bool) -> None:
    """Clamp, residual, float output and shifts, on wide tiles, a tail of channels, a first layer, and depthwise."""
    shift = requantize == "shift"
    geometries: list[dict[str, Any]] = [
        {"c": 64, "o": 64},
        {"c": 12, "o": 37},
        {"c": 70, "o": 70, "groups": 70},
        {"c": 24, "o": 40, "k": (1, 1)},
        {"c": 3, "o": 20, "padding": ((1, 1), (1, 1))},
    ]
    for geometry in geometries:
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
