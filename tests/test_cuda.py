"""The CUDA kernels against the references: on a device, or on the emulator of tests/cuda_emulator.

Without a device every test here is skipped, loudly; IMGOPT_REQUIRE_CUDA=1 makes that a failure. test_cuda_emulated.py
runs this same file with the kernels compiled for the processor (IMGOPT_CUDA_EMULATED names that library).
"""

import os
from typing import Any
from unittest.mock import patch

import masked_problems
import numpy as np
import pytest
import test_affine_warp as warp_tests
import test_int8_conv2d as conv_tests
import test_int8_graph as graph_tests
import test_masked_sgd as sgd_tests
import test_photometric as photometric_tests
import torch

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast.ops import int8_conv2d as conv_module
from imgopt_fast.ops import masked_matmul as masked_module
from imgopt_fast.ops import photometric
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES
from imgopt_fast.ops.affine_warp import reference as warp_reference
from imgopt_fast.ops.int8_graph import int8_graph, repack
from imgopt_fast.ops.masked_matmul import cuda as masked_cuda
from imgopt_fast.ops.masked_matmul import cuda_packed, mask_layout
from imgopt_fast.ops.masked_sgd import KeptBits, masked_sgd

EMULATED = os.environ.get("IMGOPT_CUDA_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)
elif not torch.cuda.is_available():
    if os.environ.get("IMGOPT_REQUIRE_CUDA") == "1":
        raise RuntimeError("IMGOPT_REQUIRE_CUDA=1, but there is no CUDA device")
    pytest.skip("no CUDA device: the CUDA kernels run on the emulator only", allow_module_level=True)
KEY = "CPU" if EMULATED else "CUDA"


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if EMULATED else "cuda")


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


OPERATIONS = (
    "affine_warp", "affine_warp_backward", "adjust_hue", "adjust_sharpness", "int8_conv2d", "int8_graph",
    "masked_matmul", "masked_matmul_packed", "masked_matmul_weight_grad", "int8_masked_matmul", "block_matmul",
    "masked_sgd", "packed_block_matmul",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_kernels_are_registered(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"imgopt_fast::{name}", KEY)


# --- affine_warp ---------------------------------------------------------------------------------------------------


def warp_matches(device: torch.device, images: torch.Tensor, matrix: torch.Tensor, **options: Any) -> torch.Tensor:
    """The result on the device, after comparing it with the float64 reference."""
    on_device = {name: moved(value, device) for name, value in options.items()}
    found = imgopt_fast.affine_warp(images.to(device), matrix.to(device), **on_device).cpu()
    dtype = options.pop("dtype", None) or images.dtype
    options.pop("memory_format", None)
    assert found.dtype == dtype
    for name in ("mean", "std"):
        if isinstance(options.get(name), float):
            options[name] = [options[name]] * images.shape[1]
    expected = warp_tests.oracle(images, matrix, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    else:
        warp_tests.check(found, expected, scale=1 / min(options.get("std") or [1.0]))
    return found


@pytest.mark.parametrize(
    ("channels", "layout"),
    [(1, "strided"), (3, "channels_last"), (3, "contiguous"), (3, "strided"), (4, "channels_last"),
     (5, "channels_last"), (33, "contiguous")],
)  # fmt: skip
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_of_uint8(device: torch.device, interpolation: str, channels: int, layout: str) -> None:
    images = warp_tests.layout(warp_tests.random_images((2, channels, 37, 41)), layout)
    matrix = warp_tests.rotation(2, 37, 41)
    fill = [float(7 * c % 256) for c in range(channels)]
    for dtype, size in ((torch.uint8, (37, 41)), (torch.float32, (33, 66)), (torch.bfloat16, (5, 64))):
        extra = {} if dtype == torch.uint8 else {"mean": 0.4, "std": 0.25}
        warp_matches(
            device, images, matrix, interpolation=interpolation, fill=fill, dtype=dtype, size=size, **extra
        )  # fmt: skip


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_warp_of_uint8_gives_the_bits_of_the_cpu(device: torch.device, channels: int, interpolation: str) -> None:
    core = _native.core()
    if core is None:
        pytest.skip("no compiled kernels for the CPU")
    images = warp_tests.random_images((2, channels, 61, 53)).contiguous(memory_format=torch.channels_last)
    matrix = warp_tests.rotation(2, 61, 53)
    homographies = torch.cat([matrix, torch.tensor([[[0.0, 0, 1]]], dtype=torch.float64).expand(2, -1, -1)], 1).numpy()
    for dtype in (torch.uint8, torch.float32):
        expected = torch.empty((2, channels, 61, 53), dtype=dtype).numpy()
        core.affine_warp(
            images.numpy(), expected, homographies, interpolation, "constant", [7.0] * channels, False, None, None,
            [], [],
        )  # fmt: skip
        found = imgopt_fast.affine_warp(
            images.to(device), matrix.to(device), interpolation=interpolation, fill=7.0, dtype=dtype
        )
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize(("channels", "scale"), [(3, 0.1), (4, 0.28), (3, 0.5), (1, 0.6), (2, 1.0), (3, 2.5)])
def test_warp_of_tiles_in_one_region_or_several(device: torch.device, channels: int, scale: float) -> None:
    core = _native.core()
    if core is None:
        pytest.skip("no compiled kernels for the CPU")
    images = warp_tests.random_images((1, channels, 121, 140)).contiguous(memory_format=torch.channels_last)
    matrix = warp_tests.rotation(1, 121, 140, scale=scale)
    homography = torch.cat([matrix, torch.tensor([[[0.0, 0, 1]]], dtype=torch.float64)], 1).numpy()
    for padding_mode in PADDING_MODES:
        expected = torch.empty((1, channels, 75, 66), dtype=torch.uint8).numpy()
        core.affine_warp(
            images.numpy(), expected, homography, "bilinear", padding_mode, [7.0] * channels, False, None, None, [], []
        )
        found = imgopt_fast.affine_warp(
            images.to(device), matrix.to(device), size=(75, 66), padding_mode=padding_mode, fill=7.0
        )
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", warp_tests.FLOATS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_of_floats(device: torch.device, interpolation: str, dtype: torch.dtype) -> None:
    images = warp_tests.random_images((2, 3, 20, 31), dtype)
    for matrix in (warp_tests.rotation(2, 20, 31), warp_tests.homography(2, 20, 31)):
        for out in (dtype, torch.uint8, torch.float16, torch.float64):
            if out == torch.float64 and dtype != torch.float64:
                continue
            if dtype == torch.float64 and interpolation == "nearest" and out != torch.float64:
                continue
            warp_matches(device, images, matrix, interpolation=interpolation, dtype=out, fill=0.3)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_borders(device: torch.device, interpolation: str, padding_mode: str) -> None:
    for shape in ((1, 3, 9, 14), (1, 3, 1, 5), (1, 3, 6, 1)):
        images = warp_tests.random_images(shape).contiguous(memory_format=torch.channels_last)
        matrix = warp_tests.rotation(1, *shape[2:], scale=0.31)
        warp_matches(
            device, images, matrix, interpolation=interpolation, padding_mode=padding_mode, fill=9.0, size=(40, 35),
            dtype=torch.float32,
        )  # fmt: skip


def test_warp_antialias_table_color_and_layouts(device: torch.device) -> None:
    images = warp_tests.random_images((3, 3, 50, 47))
    matrix = warp_tests.rotation(3, 50, 47)
    matrix[1, :, :2] *= 3.4
    matrix[2, 0] *= 2
    color = torch.tensor([[[0.5, 0.2, 0.1, 0.05], [0.1, 0.7, 0.1, -0.1], [0.3, 0.3, 0.4, 0.2]]], dtype=torch.float64)
    table = torch.randint(0, 256, (3, 3, 256), dtype=torch.uint8)
    for options in (
        {"antialias": True},
        {"table": table},
        {"color_matrix": color},
        {"antialias": True, "table": table[:1], "color_matrix": color.expand(3, -1, -1).float()},
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.uint8, torch.float16, torch.float32):
                found = warp_matches(
                    device, images, matrix, dtype=dtype, memory_format=memory_format, size=(33, 38), **options
                )  # fmt: skip
                assert found.is_contiguous(memory_format=memory_format)


def test_warp_of_more_images_than_a_device_has_room_for(device: torch.device) -> None:
    """A block then has several tiles; the last one is not whole."""
    images = warp_tests.random_images((90, 1, 41, 5))
    warp_matches(device, images, warp_tests.rotation(90, 41, 5, scale=0.9), dtype=torch.float32)


def test_warp_copies_exactly(device: torch.device) -> None:
    shift = torch.tensor([[[1.0, 0, 2], [0, 1, -1]]])
    flip = torch.tensor([[[-1.0, 0, 36], [0, 1, 0]]])
    for dtype in (torch.uint8, *warp_tests.FLOATS):
        images = warp_tests.random_images((2, 3, 19, 37), dtype).to(device)
        for interpolation in INTERPOLATIONS:
            same = imgopt_fast.affine_warp(images, torch.eye(3)[None].to(device), interpolation=interpolation)
            assert torch.equal(same, images)
            moved_by = imgopt_fast.affine_warp(images, shift.to(device), interpolation=interpolation)
            assert torch.equal(moved_by[:, :, 1:, :-2], images[:, :, :-1, 2:])
            assert torch.equal(
                imgopt_fast.affine_warp(images, flip.to(device), interpolation=interpolation), images.flip(3)
            )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e300])
def test_warp_survives_wild_matrices(device: torch.device, bad: float) -> None:
    images = warp_tests.random_images((1, 3, 4, 5)).to(device)
    for row in range(3):
        for column in range(3):
            matrix = torch.eye(3, dtype=torch.float64)[None].clone()
            matrix[0, row, column] = bad
            for padding_mode in PADDING_MODES:
                imgopt_fast.affine_warp(images, matrix.to(device), padding_mode=padding_mode, antialias=True)
    filled = imgopt_fast.affine_warp(images, torch.full((1, 2, 3), np.nan).to(device), fill=7.0)
    assert bool((filled == 7).all())


def gradients(device: torch.device, images: torch.Tensor, matrix: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    leaves = [images.to(device).requires_grad_(), matrix.to(device).requires_grad_()]
    on_device = {name: moved(value, device) for name, value in options.items()}
    found = imgopt_fast.affine_warp(*leaves, **on_device)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape).sin()
    return [g.cpu() for g in torch.autograd.grad(found, leaves, weights.to(found))]


def reference_gradients(images: torch.Tensor, matrix: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    options = {"interpolation": "bilinear", "padding_mode": "constant", "fill": 0.0, "std": 1.0} | options
    channels = images.shape[1]
    size = options.get("size", images.shape[2:])
    count = len(images) * channels * size[0] * size[1]
    grad = torch.linspace(-1, 1, count, dtype=torch.float64).view(len(images), channels, *size).sin()
    std = [options["std"]] * channels
    return list(
        warp_reference.affine_warp_backward(
            grad, images.double(), matrix.double(), options["interpolation"], options["padding_mode"],
            [options["fill"]] * channels, options.get("antialias", False), options.get("color_matrix"), std, True, True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_gradients(device: torch.device, interpolation: str, padding_mode: str) -> None:
    color = torch.tensor([[[0.5, 0.2, 0.1, 0.05], [0.1, 0.7, 0.1, -0.1], [0.3, 0.3, 0.9, 0.2]]], dtype=torch.float64)
    cases: list[tuple[tuple[int, ...], bool, dict[str, Any]]] = [
        ((2, 3, 9, 14), False, {"fill": 0.3}),
        ((1, 5, 9, 14), True, {"size": (17, 70)}),
        ((2, 3, 16, 13), False, {"antialias": True, "size": (7, 6), "color_matrix": color}),
        ((1, 1, 1, 6), False, {"size": (5, 5)}),
    ]
    for shape, perspective, options in cases:
        images = warp_tests.random_images(shape, torch.float64)
        make = warp_tests.homography if perspective else warp_tests.rotation
        matrix = make(shape[0], *shape[2:])
        if options.get("antialias"):
            matrix[:, :, :2] *= 2.3
        options = options | {"interpolation": interpolation, "padding_mode": padding_mode}
        mean_std = {} if "color_matrix" in options else {"std": 0.3, "mean": 0.5}
        expected = reference_gradients(images, matrix, std=mean_std.get("std", 1.0), **options)
        found = gradients(device, images, matrix, **options, **mean_std)
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)
        again = gradients(device, images, matrix, **options, **mean_std)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_warp_gradients_in_low_precision(device: torch.device, dtype: torch.dtype) -> None:
    images = warp_tests.random_images((1, 3, 18, 15), dtype)
    matrix = warp_tests.rotation(1, 18, 15).float()
    for padding_mode in ("constant", "reflect"):
        expected = reference_gradients(images, matrix, padding_mode=padding_mode)
        found = gradients(device, images, matrix, padding_mode=padding_mode)
        step = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=step, atol=step * float(wanted.abs().max()))


def test_warp_gradients_of_maps_without_inverse(device: torch.device) -> None:
    images = warp_tests.random_images((1, 2, 7, 8), torch.float64)
    for rows in ([[1.0, 0, 0], [2, 0, 1]], [[0.0, 0, 3.25], [0, 0, 2.5]], [[1e-7, 0, 2.5], [0, 1e-7, 3.5]]):
        matrix = torch.tensor([rows], dtype=torch.float64)
        expected = reference_gradients(images, matrix)
        for actual, wanted in zip(gradients(device, images, matrix), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", photometric_tests.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_hue_and_sharpness(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in photometric_tests.SIZES:
        images = photometric_tests.random_images(size, dtype, layout)
        shifts, factors = photometric_tests.SHIFTS, photometric_tests.FACTORS
        found = photometric.adjust_hue(images.to(device), shifts).cpu()
        photometric_tests.assert_same(found, photometric_tests.exact_hue(images, shifts), images)
        found = photometric.adjust_sharpness(images.to(device), factors).cpu()
        photometric_tests.assert_same(found, photometric_tests.exact_sharpness(images, factors), images)


# --- int8_conv2d ---------------------------------------------------------------------------------------------------

GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"c": 16, "o": 24, "padding": ((1, 1), (1, 1))},
    "3x3 deep": {"c": 64, "o": 160, "n": 3, "padding": ((1, 1), (1, 1))},
    "1x1": {"c": 48, "o": 33, "k": (1, 1)},
    "stem": {"c": 3, "o": 32, "k": (7, 7), "h": 23, "w": 21, "stride": (2, 2), "padding": ((3, 2), (2, 3))},
    "stem of one step": {"c": 3, "o": 16, "h": 11, "w": 13, "padding": ((1, 0), (0, 1))},
    "stem of many channels": {"c": 13, "o": 16, "k": (2, 5), "padding": ((1, 1), (2, 2))},
    "stem of four": {"c": 4, "o": 48, "k": (3, 2), "h": 10, "w": 9, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "odd": {"c": 5, "o": 7, "k": (2, 3), "dilation": (2, 1), "padding": ((0, 2), (1, 0))},
    "dilated": {"c": 32, "o": 16, "h": 11, "dilation": (2, 2), "padding": ((2, 2), (2, 2))},
    "grouped": {"c": 64, "o": 96, "groups": 2, "padding": ((1, 1), (1, 1))},
    "narrow groups": {"c": 24, "o": 18, "groups": 6, "padding": ((1, 1), (1, 1))},
    "odd groups": {"c": 15, "o": 10, "groups": 5},
    "depthwise": {"c": 19, "o": 19, "groups": 19, "padding": ((1, 1), (1, 1))},
    "depthwise 5x5": {"c": 32, "o": 32, "groups": 32, "k": (5, 5), "stride": (2, 2), "padding": ((2, 2), (2, 2))},
    "multiplier": {"c": 6, "o": 12, "groups": 6, "padding": ((1, 1), (1, 1))},
    "depthwise wide": {"c": 20, "o": 20, "groups": 20, "w": 17, "padding": ((1, 0), (0, 1))},
    "depthwise halved": {"c": 8, "o": 8, "groups": 8, "h": 9, "w": 31, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "groups of 4": {"c": 16, "o": 32, "groups": 4, "w": 16, "padding": ((1, 1), (1, 1))},
    "groups of 8": {"c": 24, "o": 12, "groups": 3, "w": 9, "stride": (2, 2), "padding": ((1, 1), (1, 1))},
    "groups of 8, merged": {"c": 64, "o": 128, "groups": 8, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "groups of 16, merged": {"c": 128, "o": 128, "groups": 8, "w": 6, "padding": ((1, 1), (1, 1))},
    "many pixels": {"c": 16, "o": 130, "k": (1, 1), "n": 1, "h": 31, "w": 33},
    # Borders of zero: Hopper's kernel reads them.
    "zeros": {"c": 64, "o": 160, "n": 3, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "zeros of one tile": {
        "c": 64, "o": 48, "n": 1, "h": 20, "w": 30, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros in bands": {
        "c": 48, "o": 64, "n": 3, "h": 19, "w": 38, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros to one side": {
        "c": 64, "o": 32, "n": 2, "h": 27, "w": 60, "padding": ((2, 0), (0, 2)), "input_zero_point": 0,
    },
    "zeros deep": {
        "c": 128, "o": 128, "n": 1, "h": 16, "w": 16, "padding": ((1, 1), (1, 1)), "input_zero_point": 0,
    },
    "zeros halved": {
        "c": 64, "o": 64, "n": 3, "h": 12, "w": 15, "stride": (2, 2), "padding": ((1, 1), (1, 1)),
        "input_zero_point": 0,
    },
    "zeros wide": {"c": 80, "o": 144, "k": (1, 3), "h": 6, "padding": ((0, 0), (0, 2)), "input_zero_point": 0},
    "zeros in groups": {"c": 192, "o": 256, "groups": 2, "padding": ((1, 1), (1, 1)), "input_zero_point": 0},
    "zeros dilated": {
        "c": 32, "o": 48, "h": 11, "k": (3, 2), "dilation": (2, 3), "padding": ((2, 1), (3, 0)), "input_zero_point": 0,
    },
    "deep": {"c": 320, "o": 272, "k": (1, 1), "h": 9, "w": 15},
}  # fmt: skip


@pytest.mark.parametrize("requantize", ["float", "shift"])
@pytest.mark.parametrize("dtype", conv_tests.DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_exact(device: torch.device, geometry: str, dtype: torch.dtype, requantize: str) -> None:
    rng = np.random.default_rng(len(geometry))
    for with_residual in (False, True):
        output_dtype = torch.int8 if with_residual else torch.uint8
        x, weight, bias, settings = conv_tests.layer(
            rng, input_dtype=dtype, output_dtype=output_dtype, with_residual=with_residual,
            power_of_two=requantize == "shift", **GEOMETRIES[geometry],
        )  # fmt: skip
        if with_residual:
            settings["output_min"] = 0.0
        expected = conv_tests.oracle(x, weight, bias, requantize=requantize, **settings)
        on_device = {name: moved(value, device) for name, value in settings.items()}
        found = imgopt_fast.int8_conv2d(
            x.to(device), weight.to(device), bias.to(device), requantize=requantize, **on_device
        )
        assert found.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("zero_point", [0, 113])
@pytest.mark.parametrize(
    ("channels", "side", "outputs", "kernel", "stride", "groups"),
    [(64, 56, 64, 3, 1, 1), (128, 28, 128, 3, 1, 1), (64, 56, 256, 1, 1, 1), (256, 28, 128, 1, 2, 1),
     (192, 28, 192, 3, 1, 1), (3, 112, 64, 7, 2, 1), (96, 56, 96, 3, 1, 96), (256, 28, 256, 3, 2, 32)],
)  # fmt: skip
def test_conv_of_whole_layers(
    device: torch.device, channels: int, side: int, outputs: int, kernel: int, stride: int, groups: int,
    zero_point: int, with_residual: bool,
) -> None:  # fmt: skip
    """Enough pixels for the kernels' largest tiles, which a device with many processors takes for no less."""
    if EMULATED:
        pytest.skip("hours on the emulator")
    rng, pad = np.random.default_rng(side), kernel // 2
    x, weight, bias, settings = conv_tests.layer(
        rng, n=24, c=channels, h=side, w=side, o=outputs, k=(kernel, kernel), groups=groups, stride=(stride, stride),
        padding=((pad, pad), (pad, pad)), input_zero_point=zero_point, with_residual=with_residual,
    )  # fmt: skip
    expected = imgopt_fast.int8_conv2d(x, weight, bias, **settings)
    on_device = {name: moved(value, device) for name, value in settings.items()}
    found = imgopt_fast.int8_conv2d(x.to(device), weight.to(device), bias.to(device), **on_device)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("geometry", ["3x3", "stem", "depthwise", "narrow groups", "zeros deep"])
def test_conv_float_output_and_packed_weight(device: torch.device, geometry: str) -> None:
    rng = np.random.default_rng(5)
    x, weight, bias, settings = conv_tests.layer(rng, **GEOMETRIES[geometry])
    settings |= {"output_scale": None, "output_zero_point": 0, "output_dtype": None}
    expected = conv_tests.oracle(x, weight, bias, **settings)
    scale = settings.pop("weight_scale").to(device)
    names = ("input_scale", "input_zero_point", "groups")
    packed = imgopt_fast.pack_int8_weight(
        weight.to(device), scale, bias.to(device), **{name: settings.pop(name) for name in names}
    )
    rows = conv_module.cuda_rows(weight.to(device))
    if not EMULATED:
        assert torch.equal(packed.packed, rows)
    found = imgopt_fast.int8_conv2d(x.to(device), packed._replace(packed=rows), **settings)
    np.testing.assert_array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("dtype", conv_tests.DTYPES)
def test_conv_of_extreme_values(device: torch.device, dtype: torch.dtype) -> None:
    """Sums that 16 bits cannot hold, and float32 can no longer hold exactly."""
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    for value, zero_point in ((high, low), (low, high)):
        x = torch.full((1, 512, 5, 6), value, dtype=dtype)
        weight = torch.full((32, 512, 3, 3), -128, dtype=torch.int8)
        weight[::2] = 127
        found = imgopt_fast.int8_conv2d(
            x.to(device), weight.to(device), input_scale=1.0, input_zero_point=zero_point, weight_scale=1.0,
            padding=1,
        )  # fmt: skip
        sums = torch.nn.functional.conv2d(x.double() - zero_point, weight.double(), padding=1)
        assert torch.equal(found.cpu(), sums.float())


@pytest.mark.parametrize("mode", graph_tests.MODES)
def test_graph_is_exact(device: torch.device, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if EMULATED:  # the weights in the kernels' order, as on a device
        monkeypatch.setattr(conv_module, "pack_bytes", lambda weight, groups: conv_module.cuda_rows(weight))
    program = graph_tests.network(mode)
    there = program._replace(constants=program.constants.to(device), packed=program.packed.to(device))
    for batch, height, width in ((2, 17, 19), (1, 6, 40), (0, 9, 9)):
        inputs = graph_tests.operands(batch, height, width)
        expected = graph_tests.expect(program, inputs)
        repacked = repack(there)
        assert repacked.packed.dim() == 2
        for on_device in (there, repacked):
            found = int8_graph([x.to(device) for x in inputs], on_device)
            graph_tests.assert_same([y.cpu() for y in found], expected)


# --- masked_matmul -------------------------------------------------------------------------------------------------


def masked_problem(
    device: torch.device, mask: torch.Tensor, samples: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of the operation itself, whatever `choose` would do, and their float64 references."""
    out, inputs = mask.shape
    with patch.dict(masked_cuda.LARGEST_DENSITY, {("quads", torch.float32): 1.0}):  # else a GPU's layout has none
        layout = mask_layout(mask.to(device))
    operands = [torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)]
    leaves = [t.to(device, dtype).requires_grad_() for t in operands]
    shape = [out, inputs, layout.block, layout.transposed_block, 0]
    found = masked_module.MATMUL(*leaves, *layout[1:7], shape, [], None, None)
    grad = torch.randn(samples, out).to(dtype)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    x, w, b = (t.detach().cpu().double() for t in leaves)
    g, kept = grad.double(), torch.where(mask, w, 0)
    expected = [x @ kept.t() + b, g @ kept, torch.where(mask, g.t() @ x, 0), g.sum(0)]
    return [found.detach(), *gradients], expected


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    step = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for actual, wanted in zip(found, expected, strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=step, atol=step * max(1.0, scale))


@pytest.fixture(params=[128, 0], ids=["tiled", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns per block: what CUDA's table says, and all of them, which shared memory does not hold."""

    def choice(mask: np.ndarray, isa: str | None) -> int:
        return max(1, min(request.param or mask.shape[1], mask.shape[1]))

    monkeypatch.setattr("imgopt_fast.ops.masked_matmul.layout.block_columns", choice)
    return int(request.param)


@pytest.mark.parametrize("size", masked_problems.SIZES, ids=str)
def test_masked_matmul(device: torch.device, block: int, size: tuple[int, int, int, float]) -> None:
    samples, out, inputs, density = size
    mask = masked_problems.random_mask(out, inputs, density)
    assert_near(*masked_problem(device, mask, samples, torch.float32), torch.float32)


@pytest.mark.parametrize("name", masked_problems.adversarial_masks())
def test_masked_matmul_of_adversarial_masks(device: torch.device, block: int, name: str) -> None:
    mask = masked_problems.adversarial_masks()[name]
    assert_near(*masked_problem(device, mask, 33, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masked_matmul_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    found, expected = masked_problem(device, masked_problems.random_mask(70, 300, 0.3), 67, dtype)
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("stride", [1, 2])
def test_masked_conv2d(device: torch.device, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # dense forms are torch's: 2e-5 is float32's
    mask = masked_problems.random_mask(24, 3 * 3 * 8, 0.15).view(24, 8, 3, 3)
    x, w = torch.randn(2, 16, 9, 11), torch.randn(24, 8, 3, 3)
    leaves = [x.to(device).requires_grad_(), w.to(device).requires_grad_()]
    layout = mask_layout(mask.to(device), groups=2)
    found = imgopt_fast.masked_conv2d(*leaves, layout, stride=stride, padding=1, groups=2)
    grad = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    doubles = [x.double().requires_grad_(), w.double().requires_grad_()]
    kept = torch.where(mask, doubles[1], 0)
    expected = torch.nn.functional.conv2d(doubles[0], kept, stride=stride, padding=1, groups=2)
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    assert_near([found.detach(), *gradients], [expected.detach(), *wanted], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 16, 16), (130, 400, 208), (257, 48, 592)])
def test_block_matmul(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    samples, out, inputs = size
    mask = masked_problems.random_mask(out // 16, inputs // 16, 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    bits = masked_cuda.block_bits(mask.to(device))
    assert bits is not None
    operands = [torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)]
    leaves = [t.to(device, dtype).requires_grad_() for t in operands]
    found = masked_cuda.block_matmul(*leaves, *bits)
    grad = torch.randn(samples, out).to(dtype)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    x, w, b = (t.detach().cpu().double() for t in leaves)
    g, kept = grad.double(), torch.where(mask, w, 0)
    expected = [x @ kept.t() + b, g @ kept, torch.where(mask, g.t() @ x, 0), g.sum(0)]
    assert_near([found.detach(), *gradients], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "size", "density"),
    [(16, (1, 16, 16), 1.0), (16, (130, 400, 208), 0.4), (16, (300, 816, 592), 0.05), (16, (70, 784, 80), 1.0),
     (32, (200, 832, 160), 0.3), (32, (129, 64, 96), 1.0), (32, (70, 64, 64), 0.0)],
)  # fmt: skip
def test_packed_block_matmul(
    device: torch.device, side: int, size: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    if not EMULATED and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("expected compute capability 9.0")
    samples, out, inputs = size
    blocks = masked_problems.random_mask(out // side, inputs // side, density)
    mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    x, w, b = (t.to(dtype) for t in (torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)))
    packed = cuda_packed.pack_blocks(w.to(device), mask.to(device))
    assert packed[0].shape == (int(blocks.sum()), side, side)
    torch.testing.assert_close(cuda_packed.unpack_blocks(*packed, out, inputs).cpu(), torch.where(mask, w, 0))
    expected = x.double() @ torch.where(mask, w, 0).double().t()
    for bias in (b, None):
        there = None if bias is None else bias.to(device)
        found = cuda_packed.packed_block_matmul(x.to(device), packed[0], there, *packed[1:], out)
        assert_near([found], [expected if bias is None else expected + b.double()], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["random", "sparse", "blocks", "2:4"])
def test_masked_layers_choose_a_form(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """The public functions, with whatever form the table gives the mask."""
    mask = masked_problems.random_mask(128, 192, 0.01 if kind == "sparse" else 0.5)
    if kind == "blocks":
        mask = masked_problems.random_mask(8, 12, 0.1).repeat_interleave(16, 0).repeat_interleave(16, 1)
    if kind == "2:4":
        mask = torch.tensor([True, False, False, True]).repeat(128, 48)
    x, w, b = (t.to(dtype) for t in (torch.randn(64, 192), torch.randn(128, 192), torch.randn(128)))
    expected = x.double() @ torch.where(mask, w, 0).double().t() + b.double()
    on_device = [t.to(device) for t in (x, w, mask, b)]
    trained = imgopt_fast.masked_matmul(on_device[0], on_device[1], mask_layout(on_device[2]), on_device[3])
    packed = imgopt_fast.pack_masked_weight(on_device[1], on_device[2])
    with torch.no_grad():
        inferred = imgopt_fast.masked_matmul(on_device[0], packed, None, on_device[3])
    assert_near([trained, inferred], [expected, expected], dtype)


@pytest.mark.parametrize("output_dtype", [torch.uint8, torch.int8, None])
@pytest.mark.parametrize("dtype", conv_tests.DTYPES)
def test_int8_masked_matmul_is_exact(
    device: torch.device, dtype: torch.dtype, output_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgopt_fast.ops.masked_matmul.int8.GROUP", 1)  # the device's format where it is emulated
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (35, 300)).to(dtype)
    weight, mask = torch.randint(-128, 128, (67, 300), dtype=torch.int8), masked_problems.random_mask(67, 300, 0.2)
    scale, bias = torch.rand(67) * 0.01 + 0.001, torch.randn(67)
    options = {} if output_dtype is None else {"output_scale": 0.9, "output_zero_point": 3, "output_min": -20.0}
    settings = {"input_scale": 0.05, "input_zero_point": 7}
    layer = masked_module.pack_int8_masked_weight(
        weight.to(device), mask.to(device), scale.to(device), bias.to(device), **settings
    )
    found = masked_module.int8_masked_matmul(x.to(device), layer, output_dtype=output_dtype, **options)
    dense = torch.where(mask, weight, 0)[:, :, None, None]
    expected = conv_tests.oracle(
        x[:, :, None, None], dense, bias, weight_scale=scale, output_dtype=output_dtype, **settings, **options
    )
    np.testing.assert_array_equal(found.cpu().numpy(), expected[:, :, 0, 0])


# --- graphs --------------------------------------------------------------------------------------------------------


def test_calls_are_captured_into_a_cuda_graph(device: torch.device) -> None:
    if EMULATED:
        pytest.skip("the emulator has no CUDA graphs")
    images = warp_tests.random_images((2, 3, 32, 32)).to(device)
    matrix = warp_tests.rotation(2, 32, 32).to(device)
    program = graph_tests.network("float")
    there = program._replace(constants=program.constants.to(device), packed=program.packed.to(device))
    inputs = [x.to(device) for x in graph_tests.operands(2, 17, 19)]

    def run() -> list[torch.Tensor]:
        warped = imgopt_fast.affine_warp(images, matrix, dtype=torch.bfloat16, antialias=True)
        return [warped, *int8_graph(inputs, there)]

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        images.copy_(images.flip(3))
        inputs[0].mul_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(results, run(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("options", sgd_tests.OPTIONS)
def test_masked_sgd(device: torch.device, options: dict[str, Any]) -> None:
    def run(weight: torch.Tensor, velocity: Any, grad: torch.Tensor, kept: KeptBits, **how: Any) -> None:
        there = KeptBits(kept.bits.to(device), kept.offsets.to(device), kept.entries, kept.kept)
        w, v, g = (moved(t, device) for t in (weight, velocity, grad))
        masked_sgd(w, v, g, there, **how)
        weight.copy_(w)
        if velocity is not None:
            velocity.copy_(v)

    for size in (0, 1, 63, 65, 4096, 3 * 4096 + 77):
        for density in sgd_tests.DENSITIES:
            sgd_tests.check(run, options, size, density)
