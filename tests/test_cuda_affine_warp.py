"""affine_warp and its gradients on CUDA against the reference, and against the bits of the CPU."""

from typing import Any

import numpy as np
import pytest
import torch
import warp_problems
from cuda_device import moved

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES
from imgopt_fast.ops.affine_warp import reference as warp_reference


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
    expected = warp_problems.oracle(images, matrix, **options)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    else:
        warp_problems.check(found, expected, scale=1 / min(options.get("std") or [1.0]))
    return found


@pytest.mark.parametrize(
    ("channels", "layout"),
    [(1, "strided"), (3, "channels_last"), (3, "contiguous"), (3, "strided"), (4, "channels_last"),
     (5, "channels_last"), (33, "contiguous")],
)  # fmt: skip
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_of_uint8(device: torch.device, interpolation: str, channels: int, layout: str) -> None:
    images = warp_problems.layout(warp_problems.random_images((2, channels, 37, 41)), layout)
    matrix = warp_problems.rotation(2, 37, 41)
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
    images = warp_problems.random_images((2, channels, 61, 53)).contiguous(memory_format=torch.channels_last)
    matrix = warp_problems.rotation(2, 61, 53)
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
    images = warp_problems.random_images((1, channels, 121, 140)).contiguous(memory_format=torch.channels_last)
    matrix = warp_problems.rotation(1, 121, 140, scale=scale)
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


@pytest.mark.parametrize("dtype", warp_problems.FLOATS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_warp_of_floats(device: torch.device, interpolation: str, dtype: torch.dtype) -> None:
    images = warp_problems.random_images((2, 3, 20, 31), dtype)
    for matrix in (warp_problems.rotation(2, 20, 31), warp_problems.homography(2, 20, 31)):
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
        images = warp_problems.random_images(shape).contiguous(memory_format=torch.channels_last)
        matrix = warp_problems.rotation(1, *shape[2:], scale=0.31)
        warp_matches(
            device, images, matrix, interpolation=interpolation, padding_mode=padding_mode, fill=9.0, size=(40, 35),
            dtype=torch.float32,
        )  # fmt: skip


def test_warp_antialias_table_color_and_layouts(device: torch.device) -> None:
    images = warp_problems.random_images((3, 3, 50, 47))
    matrix = warp_problems.rotation(3, 50, 47)
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
    images = warp_problems.random_images((90, 1, 41, 5))
    warp_matches(device, images, warp_problems.rotation(90, 41, 5, scale=0.9), dtype=torch.float32)


def test_warp_copies_exactly(device: torch.device) -> None:
    shift = torch.tensor([[[1.0, 0, 2], [0, 1, -1]]])
    flip = torch.tensor([[[-1.0, 0, 36], [0, 1, 0]]])
    for dtype in (torch.uint8, *warp_problems.FLOATS):
        images = warp_problems.random_images((2, 3, 19, 37), dtype).to(device)
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
    images = warp_problems.random_images((1, 3, 4, 5)).to(device)
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
        images = warp_problems.random_images(shape, torch.float64)
        make = warp_problems.homography if perspective else warp_problems.rotation
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
    images = warp_problems.random_images((1, 3, 18, 15), dtype)
    matrix = warp_problems.rotation(1, 18, 15).float()
    for padding_mode in ("constant", "reflect"):
        expected = reference_gradients(images, matrix, padding_mode=padding_mode)
        found = gradients(device, images, matrix, padding_mode=padding_mode)
        step = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=step, atol=step * float(wanted.abs().max()))


def test_warp_gradients_of_maps_without_inverse(device: torch.device) -> None:
    images = warp_problems.random_images((1, 2, 7, 8), torch.float64)
    for rows in ([[1.0, 0, 0], [2, 0, 1]], [[0.0, 0, 3.25], [0, 0, 2.5]], [[1e-7, 0, 2.5], [0, 1e-7, 3.5]]):
        matrix = torch.tensor([rows], dtype=torch.float64)
        expected = reference_gradients(images, matrix)
        for actual, wanted in zip(gradients(device, images, matrix), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-8)
