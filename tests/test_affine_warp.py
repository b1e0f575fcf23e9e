"""affine_warp: kernels, Numba twin and reference against a float64 oracle, and against torch, scipy and OpenCV."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import neon_units
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKEND
from hypothesis import given, settings
from hypothesis import strategies as st

import imgopt_fast.numpy
from imgopt_fast import _native, affine_warp
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES, fallback, reference

op = torch.ops.imgopt_fast.affine_warp.default
backward_op = torch.ops.imgopt_fast.affine_warp_backward.default
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: two threads on a busy machine only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=_native.supported_isas() if BACKEND == "native" else [BACKEND])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set, or the backend that is forced: the results are the same, so the tests are too."""
    before = _native.active_isa()
    if BACKEND == "native":
        _native.set_isa(request.param)
    yield request.param
    if BACKEND == "native" and before:
        _native.set_isa(before)


def oracle(images: torch.Tensor, matrix: torch.Tensor, **options: Any) -> torch.Tensor:
    """The reference called directly, in float64 units of the output; uint8 output stays a level before rounding."""
    options = {"size": images.shape[2:], "interpolation": "bilinear", "padding_mode": "constant", "fill": 0.0} | options
    channels = images.shape[1]
    fill = options["fill"]
    fill = [fill] * channels if isinstance(fill, (int, float)) else list(fill)
    mean, std = (options.get(k) or [] for k in ("mean", "std"))
    return reference.affine_warp(
        images, matrix, list(options["size"]), options["interpolation"], options["padding_mode"], fill,
        options.get("antialias", False), options.get("table"), options.get("color_matrix"), mean, std,
        torch.float64, torch.contiguous_format,
    )  # fmt: skip


def random_images(shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    levels = torch.randint(0, 256, shape, dtype=torch.uint8)
    return levels if dtype == torch.uint8 else (levels.double() / 255).to(dtype)


def rotation(n: int, height: int, width: int, degrees: float = 30, scale: float = 1.1) -> torch.Tensor:
    """Rotation and scale about the centre, a little different for every image."""
    result = []
    for i in range(n):
        angle, s = np.deg2rad(degrees + 17 * i), scale + 0.1 * i
        c, d = np.cos(angle) / s, np.sin(angle) / s
        x, y = (width - 1) / 2, (height - 1) / 2
        result.append([[c, d, x - c * x - d * y + 0.3], [-d, c, y + d * x - c * y - 0.2]])
    return torch.tensor(result, dtype=torch.float64).reshape(n, 2, 3)


def homography(n: int, height: int, width: int) -> torch.Tensor:
    last = torch.tensor([[0.3 / width, -0.2 / height, 1.05]], dtype=torch.float64).expand(n, 1, 3)
    return torch.cat([rotation(n, height, width), last], 1)


def layout(images: torch.Tensor, name: str) -> torch.Tensor:
    """The same pixels behind other strides."""
    if name == "channels_last":
        return images.contiguous(memory_format=torch.channels_last)
    if name == "strided":
        n, c, h, w = images.shape
        wide = images.new_zeros((n, c + 1, h + 2, 2 * w + 1))
        view = wide[:, 1:, 1 : h + 1, 1 : 2 * w + 1 : 2]
        return view.copy_(images)
    return images.contiguous()


# 1/255 · (0.02 levels), and the rounding of the output to its dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 4.1e-3, torch.float16: 6e-4, torch.uint8: 0}


def check(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """`expected` in float64 units of [0, 1]; uint8 may differ only where the exact level is within 0.02 of a tie."""
    assert actual.shape == expected.shape
    if actual.dtype == torch.uint8:
        levels = (expected * 255).clamp(0, 255)
        off = (actual.double() - levels).abs()
        assert (off <= 0.5 + 0.02).all(), off.max()
    else:
        torch.testing.assert_close(
            actual.double(), expected, rtol=TOLERANCE[actual.dtype], atol=scale * TOLERANCE[actual.dtype]
        )


# --- against the oracle --------------------------------------------------------------------------------------------

SIZES = [  # n, c, input, output
    (2, 3, (23, 37), (31, 70)),
    (1, 1, (64, 65), (17, 129)),
    (3, 4, (9, 16), (16, 16)),
    (1, 3, (1, 1), (5, 3)),
    (2, 1, (1, 7), (3, 63)),
    (2, 2, (6, 1), (64, 64)),
    (1, 5, (40, 30), (8, 15)),
]


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_oracle(dtype: torch.dtype, interpolation: str, padding_mode: str, isa: str) -> None:
    for (n, c, (h, w), size), perspective in itertools.product(SIZES, (False, True)):
        images = random_images((n, c, h, w), dtype)
        matrix = (homography if perspective else rotation)(n, h, w)
        fill = [float(10 * i + 3) for i in range(c)]
        if dtype != torch.uint8:
            fill = [v / 255 for v in fill]
        options = {"size": size, "interpolation": interpolation, "padding_mode": padding_mode, "fill": fill}
        expected = oracle(images, matrix, **options)
        for name, output in (("contiguous", dtype), ("channels_last", torch.float32), ("strided", torch.uint8)):
            memory_format = torch.channels_last if name == "channels_last" else torch.contiguous_format
            actual = affine_warp(layout(images, name), matrix, dtype=output, memory_format=memory_format, **options)
            assert actual.dtype == output
            assert actual.is_contiguous(memory_format=memory_format)
            check(actual, expected)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_normalised(dtype: torch.dtype, channels: int, isa: str) -> None:
    images = random_images((2, channels, 50, 61))
    matrix = rotation(2, 50, 61)
    mean, std = [0.485, 0.456, 0.406, 0.5][:channels], [0.229, 0.224, 0.225, 0.3][:channels]
    options: dict[str, Any] = {"size": (45, 70), "fill": 128.0}
    if dtype != torch.uint8:
        options |= {"mean": mean, "std": std}
    expected = oracle(images, matrix, **options)
    for name in ("contiguous", "channels_last", "strided"):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            check(
                affine_warp(layout(images, name), matrix, dtype=dtype, memory_format=memory_format, **options),
                expected, scale=2 / 0.224,
            )  # fmt: skip


@pytest.mark.parametrize("images_dtype", [torch.uint8, torch.float32, torch.float64])
def test_color_matrix_and_table(images_dtype: torch.dtype, isa: str) -> None:
    images = random_images((2, 3, 20, 33), images_dtype)
    matrix = rotation(2, 20, 33)
    colors = torch.rand(2, 3, 4, dtype=torch.float64) * 1.5 - 0.4
    table = torch.stack([torch.randperm(256).to(torch.uint8) for _ in range(6)]).view(2, 3, 256)
    options: dict[str, Any] = {"color_matrix": colors, "fill": [0.2, 0.4, 0.7]}
    if images_dtype == torch.uint8:
        options |= {"table": table, "fill": [20, 90, 200]}
    normal = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    exact = oracle(images, matrix, **options)
    assert 0.1 < ((exact == 0) | (exact == 1)).double().mean() < 0.9  # the clamp matters
    check(affine_warp(images, matrix, dtype=torch.uint8, **options), oracle(images, matrix, **options))
    check(
        affine_warp(images, matrix, dtype=torch.float32, **options, **normal),
        oracle(images, matrix, **options, **normal), scale=3,
    )  # fmt: skip
    for key in ("color_matrix", "table"):
        if key in options:
            one = options | {key: options[key][1:]}
            check(affine_warp(images, matrix, dtype=torch.float32, **one), oracle(images, matrix, **one))


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_antialias(dtype: torch.dtype, padding_mode: str, isa: str) -> None:
    images = random_images((4, 3, 40, 53), dtype)
    matrix = rotation(4, 40, 53, degrees=5, scale=0.5)
    matrix[:, 0] *= torch.tensor([1.0, 2.0, 0.3, 900.0])[:, None]
    for m in (matrix, homography(4, 40, 53) * torch.tensor([2.2, 3.1, 1.0])[:, None]):
        options = {
            "size": (13, 19),
            "padding_mode": padding_mode,
            "antialias": True,
            "fill": 0.5 if dtype.is_floating_point else 77,
        }
        check(affine_warp(images, m, **options), oracle(images, m, **options))
    table = 255 - torch.arange(256, dtype=torch.uint8).expand(1, 3, 256)
    if dtype == torch.uint8:
        check(affine_warp(images, matrix, table=table, **options), oracle(images, matrix, table=table, **options))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("arrangement", ["contiguous", "channels_last", "strided"])
def test_tables_and_boxes_of_every_layout(channels: int, arrangement: str, isa: str) -> None:
    """Bit for bit, against NumPy: the table of each channel, then means that round half up."""
    n, h, w = 2, 19, 37
    images = layout(random_images((n, channels, h, w), torch.uint8), arrangement)
    table = torch.stack([torch.randperm(256) for _ in range(n * channels)]).to(torch.uint8).view(n, channels, 256)
    looked_up = table.gather(2, images.flatten(2).long()).view_as(images)
    eye = torch.eye(3)[None, :2]
    assert torch.equal(affine_warp(images, eye, table=table, interpolation="nearest"), looked_up)
    for box in (2, 3, 4, 5, 40):
        width, height = -(-w // box), -(-h // box)
        exact = torch.empty(n, channels, height, width, dtype=torch.uint8)
        for y, x in itertools.product(range(height), range(width)):
            area = looked_up[:, :, y * box : (y + 1) * box, x * box : (x + 1) * box].long().flatten(2)
            exact[:, :, y, x] = ((2 * area.sum(2) + area.shape[2]) // (2 * area.shape[2])).to(torch.uint8)
        # floor(box x + (box - 1) / 2 + ...) falls on the middle of box x.
        matrix = torch.tensor([[[box, 0, (box - 1) / 2], [0, box, (box - 1) / 2]]], dtype=torch.float64)
        options = {"size": (height, width), "interpolation": "nearest", "antialias": True, "padding_mode": "edge"}
        assert torch.equal(affine_warp(images, matrix, table=table, **options), exact), box


def test_box_means_round_half_up_for_every_sum(isa: str) -> None:
    """All sums of 2 x 2 levels, and large boxes of few levels, where the quotient is taken by division."""
    levels = torch.arange(1021)
    parts = torch.stack([(levels + k) // 4 for k in range(4)], dim=1).to(torch.uint8)  # four levels of each sum
    images = parts.view(1021, 1, 2, 2)
    exact = (2 * levels + 4) // 8
    half = torch.tensor([[[2, 0, 0.5], [0, 2, 0.5]]], dtype=torch.float64)
    result = affine_warp(images, half, size=(1, 1), antialias=True, interpolation="nearest", padding_mode="edge")
    assert torch.equal(result.flatten().long(), exact)
    for side in (180, 181, 200):  # 2^15 lies between the squares of the first two
        tall = torch.zeros(1, 1, side, side, dtype=torch.uint8)
        for lit in (side * side // 2 - 1, side * side // 2, side * side // 2 + 1):
            tall.view(-1)[:] = 0
            tall.view(-1)[:lit] = 1
            matrix = torch.tensor([[[side, 0, (side - 1) / 2], [0, side, (side - 1) / 2]]], dtype=torch.float64)
            mean = affine_warp(tall, matrix, size=(1, 1), antialias=True, interpolation="nearest", padding_mode="edge")
            assert mean.item() == (2 * lit + side * side) // (2 * side * side)


def test_antialias_is_a_box_mean() -> None:
    images = random_images((1, 1, 6, 8))
    half = torch.tensor([[[2.0, 0, 0.5], [0, 3.0, 1.0]]])
    exact = images[0, 0].view(2, 3, 4, 2).double().mean((1, 3))
    assert torch.equal(
        affine_warp(images, half, size=(2, 4), antialias=True)[0, 0], (exact + 0.5).floor().to(torch.uint8)
    )


def test_numba_twin_directly() -> None:
    colors = torch.rand(1, 3, 4, dtype=torch.float64) * 0.6
    for dtype, transform in ((torch.uint8, rotation), (torch.float32, homography)):
        images, matrix = layout(random_images((2, 3, 19, 24), dtype), "channels_last"), transform(2, 19, 24)
        fill = [0.1, 0.5, 0.9] if dtype.is_floating_point else [10.0, 100.0, 200.0]
        for interpolation, padding_mode, antialias in itertools.product(INTERPOLATIONS, PADDING_MODES, (False, True)):
            arguments = ([11, 13], interpolation, padding_mode, fill, antialias, None, colors, [], [])
            actual = fallback.affine_warp(images, matrix * 2.1, *arguments, dtype, torch.contiguous_format)
            expected = reference.affine_warp(
                images, matrix * 2.1, *arguments, torch.float64, torch.contiguous_format
            )  # fmt: skip
            check(actual, expected)


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_identity_shift_and_flip_are_exact(dtype: torch.dtype, interpolation: str, padding_mode: str, isa: str) -> None:
    for c, (h, w) in ((3, (33, 130)), (1, (5, 64)), (4, (7, 17)), (2, (1, 3))):
        images = random_images((1, c, h, w), dtype)
        options: dict[str, Any] = {"interpolation": interpolation, "padding_mode": padding_mode}
        for name in ("contiguous", "channels_last"):
            source = layout(images, name)
            assert torch.equal(affine_warp(source, torch.eye(3)[None], **options), images)
            flip = torch.tensor([[[-1.0, 0, w - 1], [0, -1, h - 1]]])
            assert torch.equal(affine_warp(source, flip, **options), images.flip(2, 3))
            shift = torch.tensor([[[1.0, 0, -2], [0, 1, 1]]])
            mode = {"edge": "edge", "constant": "constant", "reflect": "reflect", "symmetric": "symmetric"}[
                padding_mode
            ]
            padded = np.pad(images.double().numpy(), ((0, 0), (0, 0), (0, 1), (2, 0)), mode)  # type: ignore[call-overload]
            expected = torch.from_numpy(padded[:, :, 1:, :w]).to(dtype)
            assert torch.equal(affine_warp(source, shift, **options), expected)


def test_float_of_uint8_within_two_ulp(isa: str) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for interpolation in INTERPOLATIONS:
        actual = affine_warp(images, torch.eye(3)[None], dtype=torch.float32, interpolation=interpolation)
        exact = images.double() / 255
        ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
        assert ((actual.double() - exact).abs() <= 2 * ulp).all()


def test_half_even_ties(isa: str) -> None:
    """A shift by half a pixel puts every second value on a tie."""
    images = random_images((1, 3, 40, 64))
    shift = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]])
    left, right = images[..., :-1].double(), images[..., 1:].double()
    actual = affine_warp(images, shift)[..., :-1]
    assert torch.equal(actual, ((left + right) / 2).round().to(torch.uint8))


def test_reciprocal_of_the_weight_sum_rounds_exactly() -> None:
    """rne(float32(acc) · float32(1/32512)) is the exact quotient rounded half to even, for every possible sum."""
    total = 32512
    acc = np.arange(-2 * 255, 255 * total + 2 * 255 + 1, dtype=np.int64)
    found = np.rint(acc.astype(np.float32) * np.float32(1 / total)).astype(np.int64)
    twice, floor = 2 * (acc % total), acc // total
    up = (twice > total) | ((twice == total) & (floor % 2 == 1))
    assert np.array_equal(found, floor + up)


# --- degenerate and hostile coordinates ----------------------------------------------------------------------------

BIG = [1e4, -1e9, 1e15, 1e300, -1e308, float("inf"), float("-inf"), float("nan"), 0.0, 1e-320]


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_non_finite_coordinates_yield_fill(padding_mode: str, isa: str) -> None:
    for dtype, interpolation in itertools.product((torch.uint8, torch.float32), INTERPOLATIONS):
        images = random_images((1, 3, 9, 70), dtype)
        fill = [3.0, 5.0, 7.0]
        expected = torch.tensor(fill)[:, None, None].expand(3, 9, 70).to(dtype)
        options: dict[str, Any] = {"fill": fill, "interpolation": interpolation, "padding_mode": padding_mode}
        for value, row, column in itertools.product((float("nan"), float("inf"), -float("inf")), (0, 1), (0, 1, 2)):
            matrix = torch.eye(3)[None, :2].clone()
            matrix[0, row, column] = value
            assert torch.equal(affine_warp(images, matrix, **options)[0], expected)
        vanishing = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 0]]])  # w = 0
        assert torch.equal(affine_warp(images, vanishing, **options)[0], expected)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.sampled_from(BIG) | st.floats(-5, 5), min_size=9, max_size=9),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 70)),
    size=st.tuples(st.integers(0, 20), st.integers(0, 140)),
    interpolation=st.sampled_from(INTERPOLATIONS),
    padding_mode=st.sampled_from(PADDING_MODES),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    antialias=st.booleans(),
    rows=st.sampled_from([2, 3]),
)
def test_any_matrix_is_safe_and_isas_agree(
    entries: list[float], shape: tuple[int, ...], size: tuple[int, int], interpolation: str, padding_mode: str,
    dtype: torch.dtype, antialias: bool, rows: int,
) -> None:  # fmt: skip
    """Every pixel comes from the image or the fill, and every instruction set finds the same bits."""
    images = random_images(shape, dtype)
    matrix = torch.tensor(entries, dtype=torch.float64).view(1, 3, 3)[:, :rows]
    results = []
    before = _native.active_isa()
    for name in _native.supported_isas() if BACKEND == "native" else [""]:
        if name:
            _native.set_isa(name)
        for output in (dtype, torch.float32, torch.bfloat16):
            results.append(
                affine_warp(
                    images, matrix, size=size, interpolation=interpolation, padding_mode=padding_mode, fill=1.0,
                    antialias=antialias, dtype=output,
                )
            )  # fmt: skip
    if before:
        _native.set_isa(before)
    for i, result in enumerate(results):
        assert result.shape == (*shape[:2], *size)
        assert torch.equal(result, results[i % 3])
    if interpolation != "bicubic" and dtype == torch.float32:
        assert ((results[0] >= -1e-6) & (results[0] <= 1 + 1e-6)).all()


@pytest.mark.parametrize("padding_mode", ["reflect", "symmetric"])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_isas_mirror_alike(side: int, padding_mode: str) -> None:
    """Around every multiple of the period, where a coordinate may be mirrored or not for the same value."""
    images = random_images((1, 3, side, side))
    shifts = torch.arange(-3 * side, 3 * side + 1, dtype=torch.float64) + 0.3
    matrix = torch.eye(2, 3, dtype=torch.float64).repeat(len(shifts), 1, 1)
    matrix[:, :, 2] = shifts[:, None]
    found = []
    before = _native.active_isa()
    for name in _native.supported_isas() if BACKEND == "native" else []:
        _native.set_isa(name)
        found.append(
            affine_warp(
                images.expand(len(shifts), -1, -1, -1),
                matrix,
                interpolation="bicubic",
                padding_mode=padding_mode,
                dtype=torch.float32,
            )
        )
    if before:
        _native.set_isa(before)
    assert all(torch.equal(result, found[0]) for result in found)


def test_isas_agree_bit_for_bit() -> None:
    """Ordinary warps, every combination that a vector unit may serve."""
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend has no instruction sets")
    before = _native.active_isa()
    assert before is not None
    colors = torch.rand(1, 3, 4) * 0.5
    cases = itertools.product(
        (1, 3, 4), INTERPOLATIONS, PADDING_MODES, (rotation, homography), (torch.uint8, torch.float32, torch.float16),
        (torch.contiguous_format, torch.channels_last),
    )  # fmt: skip
    for i, (c, interpolation, padding_mode, transform, dtype, memory_format) in enumerate(cases):
        images = layout(random_images((2, c, 30 + i % 7, 80 + i % 5)), ("contiguous", "channels_last")[i % 2])
        matrix = transform(2, 30, 80)
        options: dict[str, Any] = {
            "fill": 9.0,
            "size": (25, 70 + i % 9),
            "dtype": dtype,
            "memory_format": memory_format,
        }
        if dtype != torch.uint8:
            options |= {"mean": 0.4, "std": 0.3}
        if c == 3 and i % 3 == 0:
            options["color_matrix"] = colors
        results = []
        for name in _native.supported_isas():
            _native.set_isa(name)
            results.append(
                affine_warp(images, matrix, interpolation=interpolation, padding_mode=padding_mode, **options)
            )
        _native.set_isa(before)
        assert all(torch.equal(r, results[0]) for r in results), (c, interpolation, padding_mode, transform, dtype)


def test_isas_agree_on_patches() -> None:
    """The AVX-512 unit looks taps up in 15 x 16 source pixels per 8 x 8 outputs: sides around those, scales around the
    last that fits, blocks inside, at the border, beyond it and cut off, and homographies that fit here and there."""
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend has no instruction sets")
    before = _native.active_isa()
    assert before is not None
    generator = np.random.default_rng(4)
    for i in range(240):
        channels, nearest = (1, 3, 4)[i % 3], i % 2
        height, width = (int(v) for v in generator.integers(14, 48, 2))
        angle, scale = generator.uniform(0, 2 * np.pi), generator.uniform(0.1, 2.2)
        c, d = np.cos(angle) * scale, np.sin(angle) * scale
        centre = generator.uniform(-30, 60, 2)
        matrix = torch.tensor([[[c, d, centre[0]], [-d, c, centre[1]], [0, 0, 1]]], dtype=torch.float64)
        if i % 4 == 3:
            matrix[0, 2, :2] = torch.from_numpy(generator.uniform(-0.02, 0.02, 2))
        images = layout(random_images((2, channels, height, width)), ("contiguous", "channels_last")[i // 2 % 2])
        options: dict[str, Any] = {
            "size": tuple(int(v) for v in generator.integers(1, 90, 2)),
            "padding_mode": PADDING_MODES[i // 3 % 4],
            "interpolation": "nearest" if nearest else "bilinear",
            "fill": [9.0, 200.0, 31.0, 77.0][:channels],
            "dtype": (torch.uint8, torch.bfloat16, torch.float16, torch.float32)[i // 5 % 4],
            "memory_format": (torch.contiguous_format, torch.channels_last)[i // 7 % 2],
        }
        if channels == 3 and i % 5 == 0:
            options["color_matrix"] = torch.eye(3, 4)[None] * 0.7 + 0.1
        results = []
        for name in _native.supported_isas():
            _native.set_isa(name)
            results.append(affine_warp(images, matrix.expand(2, -1, -1), **options))
        _native.set_isa(before)
        assert all(torch.equal(r, results[0]) for r in results), (i, options)


def test_isas_agree_on_floating_images() -> None:
    """The vector units sample these from float32 planes, four channels at a time, whole images or tiles of them: sides
    around a vector's, windows that do not fit or do not pay, values that are not finite, and every layout."""
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend has no instruction sets")
    before = _native.active_isa()
    assert before is not None
    generator = np.random.default_rng(6)
    for i in range(200):
        channels, dtype = (1, 3, 4, 2, 6)[i % 5], (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        height, width = (int(v) for v in generator.integers(1, 48, 2))
        if i % 20 == 0:
            height, width = 300, 310  # 372 kB a plane
        angle, scale = generator.uniform(0, 2 * np.pi), generator.uniform(0.1, 2.2) * (4 if i % 11 == 0 else 1)
        c, d = np.cos(angle) * scale, np.sin(angle) * scale
        centre = generator.uniform(-30, 60, 2)
        matrix = torch.tensor([[[c, d, centre[0]], [-d, c, centre[1]], [0, 0, 1]]], dtype=torch.float64)
        if i % 4 == 3:
            matrix[0, 2, :2] = torch.from_numpy(generator.uniform(-0.02, 0.02, 2))
        images = random_images((2, channels, height, width), dtype)
        if i % 7 == 0:
            images.view(-1)[torch.randint(0, images.numel(), (3,))] = torch.tensor([np.nan, np.inf, -np.inf]).to(dtype)
        options: dict[str, Any] = {
            "size": tuple(int(v) for v in generator.integers(1, 200, 2)),
            "padding_mode": PADDING_MODES[i // 3 % 4],
            "interpolation": INTERPOLATIONS[i // 2 % 3],
            "fill": [9.0, 200.0, 31.0, 77.0, 5.0, 0.5][:channels],
            "dtype": (dtype, torch.uint8, torch.bfloat16, torch.float16, torch.float32)[i // 5 % 5],
            "memory_format": (torch.contiguous_format, torch.channels_last)[i // 7 % 2],
            "antialias": i % 13 == 0,
        }
        if channels == 3 and i % 2:
            options["color_matrix"] = torch.eye(3, 4)[None] * 0.7 + 0.1
        results = []
        for name in _native.supported_isas():
            _native.set_isa(name)
            results.append(
                affine_warp(
                    layout(images, ("contiguous", "channels_last", "strided")[i // 2 % 3]),
                    matrix.expand(2, -1, -1),
                    **options,
                )
            )
        _native.set_isa(before)
        for result in results:
            torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True, msg=str((i, options)))


# Images at either end of readable memory, pages without access around it: a read outside ends the process.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
import imgopt_fast.numpy as native

page, pages = mmap.PAGESIZE, 8
memory = mmap.mmap(-1, (pages + 2) * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
mprotect = ctypes.CDLL(None, use_errno=True).mprotect
for at in (0, pages + 1):
    assert mprotect(ctypes.c_void_p(start + at * page), ctypes.c_size_t(page), 0) == 0
room = np.frombuffer(memory, np.uint8)[page : (pages + 1) * page]
room[:] = np.arange(room.size) % 251
for channels, dtype in ((1, "u1"), (3, "u1"), (4, "u1"), (1, "f4"), (3, "f4"), (3, "f2"), (4, "f2")):
    for height, width in ((1, 1), (2, 3), (15, 16), (16, 15), (17, 18), (33, 40), (64, 64)):
        size = height * width * channels * np.dtype(dtype).itemsize
        if size > room.size:
            continue
        for at in (0, room.size - size):
            image = room[at : at + size].view(dtype).reshape(height, width, channels)
            for degrees in (0, 30, 90, 200):
                for scale in (0.5, 1.0, 1.7):
                    c, d = np.cos(np.deg2rad(degrees)) * scale, np.sin(np.deg2rad(degrees)) * scale
                    x, y = (width - 1) / 2, (height - 1) / 2
                    matrix = np.array([[c, d, x - c * x - d * y], [-d, c, y + d * x - c * y]])
                    for interpolation in ("nearest", "bilinear", "bicubic"):
                        for padding in ("constant", "reflect"):
                            how = dict(interpolation=interpolation, padding_mode=padding)
                            native.affine_warp(image, matrix, **how)
print("read nothing else")
"""


def test_nothing_outside_the_image_is_read(isa: str) -> None:
    if BACKEND != "native" or not sys.platform.startswith("linux"):
        pytest.skip("guarded pages are set up for native kernels on Linux")
    environment = {**os.environ, "IMGOPT_ISA": isa}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert "read nothing else" in done.stdout


def test_threads_do_not_change_bits(isa: str) -> None:
    images = random_images((3, 3, 61, 97))
    matrix = rotation(3, 61, 97)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for padding_mode in PADDING_MODES:
            results.append(affine_warp(images, matrix, size=(200, 210), padding_mode=padding_mode))
    torch.set_num_threads(before)
    for i, result in enumerate(results):
        assert torch.equal(result, results[i % len(PADDING_MODES)])


def test_batch_is_its_images(isa: str) -> None:
    images, matrix = random_images((4, 3, 33, 35)), rotation(4, 33, 35)
    whole = affine_warp(images, matrix)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], affine_warp(images[i : i + 1], matrix[i : i + 1]))
    one = affine_warp(images, matrix[:1])
    assert torch.equal(one, affine_warp(images, matrix[:1].expand(4, -1, -1)))


def test_vanishing_w_at_a_corner(isa: str) -> None:
    """Found by the property test: no bound on the touched pixels may come from a corner at infinity."""
    images = random_images((1, 1, 4, 4))
    matrix = torch.tensor([[[1.0, 1, 1], [1, 1, 1], [1, 0, 0]]])
    actual = affine_warp(images, matrix, size=(3, 2), fill=7, interpolation="nearest")
    expected = [[7, images[0, 0, 2, 2]], [7, images[0, 0, 3, 3]], [7, 7]]
    assert actual[0, 0].tolist() == expected


def test_large_images_keep_their_last_columns(isa: str) -> None:
    """float32 coordinates without a base would be off by half a pixel at column 2^24."""
    width = (1 << 24) + 77
    images = (torch.arange(width) % 251).to(torch.uint8).view(1, 1, 1, width)
    assert torch.equal(affine_warp(images, torch.eye(3)[None]), images)


def test_minification_without_antialias(isa: str) -> None:
    images = random_images((1, 3, 600, 700))
    matrix = torch.tensor([[[9.7, 0.3, 1.1], [-0.2, 8.9, 40.2]]])
    check(affine_warp(images, matrix, size=(60, 65)), oracle(images, matrix, size=(60, 65)))


def test_empty() -> None:
    assert affine_warp(torch.zeros(0, 3, 4, 5), torch.zeros(0, 2, 3)).shape == (0, 3, 4, 5)
    assert affine_warp(torch.zeros(2, 3, 4, 5), torch.zeros(1, 2, 3), size=(0, 9)).shape == (2, 3, 0, 9)
    assert affine_warp(torch.zeros(2, 0, 4, 5), torch.zeros(1, 2, 3)).shape == (2, 0, 4, 5)


def test_neon_unit_in_an_emulator(tmp_path: Path) -> None:
    assert neon_units.compared("affine_warp", tmp_path) == "1728 cases, 0 differ\n"


# --- against other libraries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("padding_mode", "torch_mode", "align"),
    [
        ("constant", "zeros", False),
        ("edge", "border", False),
        ("symmetric", "reflection", False),
        ("reflect", "reflection", True),
    ],
)
def test_grid_sample(interpolation: str, padding_mode: str, torch_mode: str, align: bool) -> None:
    """torch in float64. Its bicubic clips and folds each tap, as ours does, so every mode agrees."""
    h, w, size = 19, 26, (31, 22)
    images = torch.rand(2, 3, h, w, dtype=torch.float64)
    matrix = rotation(2, h, w, degrees=20, scale=0.6)
    x, y = reference.coordinates(matrix, size)
    gx, gy = (2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1) if align else ((2 * x + 1) / w - 1, (2 * y + 1) / h - 1)
    expected = F.grid_sample(images, torch.stack([gx, gy], -1), interpolation, torch_mode, align_corners=align)
    actual = affine_warp(images, matrix, size=size, interpolation=interpolation, padding_mode=padding_mode)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    narrow = affine_warp(images.float(), matrix, size=size, interpolation=interpolation, padding_mode=padding_mode)
    torch.testing.assert_close(narrow.double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("order", "interpolation"), [(0, "nearest"), (1, "bilinear")])
@pytest.mark.parametrize(
    ("mode", "padding_mode"),
    [("grid-constant", "constant"), ("nearest", "edge"), ("mirror", "reflect"), ("reflect", "symmetric")],
)
def test_scipy(order: int, interpolation: str, mode: str, padding_mode: str) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(1).random((17, 24))
    m = rotation(1, 17, 24, degrees=-40, scale=0.7)[0].numpy()
    rows_first = np.array([[m[1, 1], m[1, 0]], [m[0, 1], m[0, 0]]])
    expected = ndimage.affine_transform(
        image, rows_first, m[::-1, 2], output_shape=(20, 30), order=order, mode=mode, cval=0.25
    )
    actual = affine_warp(
        torch.from_numpy(image)[None, None], torch.from_numpy(m)[None], size=(20, 30), interpolation=interpolation,
        padding_mode=padding_mode, fill=0.25,
    )  # fmt: skip
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, atol=1e-10)


@pytest.mark.parametrize(("flag", "interpolation"), [("INTER_LINEAR", "bilinear"), ("INTER_CUBIC", "bicubic")])
@pytest.mark.parametrize(
    ("border", "padding_mode"),
    [("CONSTANT", "constant"), ("REPLICATE", "edge"), ("REFLECT_101", "reflect"), ("REFLECT", "symmetric")],
)
def test_opencv(flag: str, interpolation: str, border: str, padding_mode: str) -> None:
    """On a smooth image: the fixed-point paths of OpenCV place samples on a grid of 1/32 pixel."""
    cv2 = pytest.importorskip("cv2")
    y, x = np.mgrid[0:64, 0:80]
    image = np.stack([x * 2 + y, 255 - x - 2 * y, 100 + 50 * np.sin(x / 20)], -1).clip(0, 255).astype(np.uint8)
    m = rotation(1, 64, 80, degrees=25, scale=0.9)
    expected = cv2.warpAffine(
        image, m[0].numpy(), (90, 70), flags=getattr(cv2, flag) | cv2.WARP_INVERSE_MAP,
        borderMode=getattr(cv2, f"BORDER_{border}"), borderValue=(10, 20, 30),
    )  # fmt: skip
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    actual = affine_warp(
        images, m, size=(70, 90), interpolation=interpolation, padding_mode=padding_mode, fill=[10, 20, 30]
    )
    off = np.abs(actual[0].permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
    steep = 4 if padding_mode == "constant" else 1  # 1/32 pixel of a step of up to 255 levels, on both axes
    inside = np.percentile(off, 97)
    assert inside <= 1, off.max()
    assert off.max() <= steep * 4, off.max()


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rows", [2, 3])
def test_gradcheck(interpolation: str, padding_mode: str, rows: int) -> None:
    images = torch.rand(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    matrix = (rotation if rows == 2 else homography)(2, 5, 6).requires_grad_()
    colors = torch.rand(2, 3, 4, dtype=torch.float64) * 0.6 - 0.1
    options: dict[str, Any] = {
        "size": (4, 7), "interpolation": interpolation, "padding_mode": padding_mode, "fill": [0.2, 0.4, 0.6],
    }  # fmt: skip
    assert torch.autograd.gradcheck(lambda i, m: affine_warp(i, m, **options), (images, matrix))
    options |= {"color_matrix": colors, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert torch.autograd.gradcheck(lambda i, m: affine_warp(i, m, **options), (images, matrix))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_backward_matches_the_reference(dtype: torch.dtype, interpolation: str, antialias: bool) -> None:
    n, h, w, size = 3, 18, 23, [17, 71]
    images = layout(random_images((n, 3, h, w), dtype), "channels_last" if antialias else "strided")
    matrix = rotation(n, h, w, scale=0.45 if antialias else 1.1)
    colors = torch.rand(n, 3, 4) * 0.6 - 0.1
    grad = torch.rand(n, 3, *size, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    cases = [(mode, colors if i % 2 else None, i >= 2) for i, mode in enumerate(PADDING_MODES)]
    for padding_mode, color, one in cases:
        m = matrix[:1] if one else matrix
        rest = (interpolation, padding_mode, [0.1, 0.2, 0.3], antialias, color, [0.5, 0.6, 0.7], True, True)
        found = backward_op(grad, images, m, *rest)
        expected = reference.affine_warp_backward(grad.double(), images.double(), m, *rest)
        assert found[0].dtype == dtype
        assert found[0].shape == images.shape
        bound = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 2e-3)
        torch.testing.assert_close(found[0].double(), expected[0], atol=bound, rtol=bound)
        scale = float(expected[1].abs().max()) + 1
        torch.testing.assert_close(found[1].double() / scale, expected[1] / scale, atol=3 * bound / 10, rtol=0)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_backward_is_deterministic(interpolation: str, padding_mode: str, isa: str) -> None:
    """Threads share an image, whose rows they cut anywhere; no cut and no instruction set changes a bit."""
    before, native = torch.get_num_threads(), _native.active_isa()
    for case, (channels, transform, antialias) in enumerate(
        [(3, rotation, False), (1, rotation, True), (6, homography, False), (3, rotation, True)]
    ):
        images = torch.rand(2, channels, 73, 151, generator=torch.Generator().manual_seed(case))
        matrix = transform(1, 73, 151).float()
        if antialias:
            matrix[:, :2, :2] *= 3.1
        grad = torch.rand(2, channels, 90, 141, generator=torch.Generator().manual_seed(case + 9)) - 0.5
        fill = [0.3] * channels
        results = []
        for threads, forced in ((1, None), (2, None), (3, None), (1, "scalar")):
            torch.set_num_threads(threads)
            if forced and BACKEND == "native":
                _native.set_isa(forced)
            results.append(
                backward_op(grad, images, matrix, interpolation, padding_mode, fill, antialias, None, [], True, True)
            )
        torch.set_num_threads(before)
        if native:
            _native.set_isa(native)
        for found in results[1:]:
            assert torch.equal(found[0], results[0][0]), case
            assert torch.equal(found[1], results[0][1]), case


def test_backward_of_bands() -> None:
    """An image whose gradient is made in several bands, with a box that no band's edge respects."""
    images = torch.rand(1, 3, 700, 300)
    for padding_mode, scale in itertools.product(("constant", "edge"), (1.0, 3.3)):
        matrix = rotation(1, 700, 300).float()
        matrix[:, :2, :2] *= scale
        grad = torch.rand(1, 3, 200, 333) - 0.5
        rest = ("bilinear", padding_mode, [0.1] * 3, scale > 1, None, [], True, True)
        found = backward_op(grad, images, matrix, *rest)
        expected = reference.affine_warp_backward(grad.double(), images.double(), matrix, *rest)
        torch.testing.assert_close(found[0].double(), expected[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[1], expected[1], atol=1e-3 * float(expected[1].abs().max()), rtol=0)


def test_backward_of_any_matrix_is_safe(isa: str) -> None:
    """Huge, degenerate and non-finite matrices read and write nothing beyond the image."""
    extremes = [0.0, 1e-30, 1.0, -3e5, 1e9, 1e300, float("inf"), float("nan")]
    images, grad = torch.rand(1, 3, 9, 11), torch.rand(1, 3, 7, 70)
    draw = np.random.default_rng(3)
    for _ in range(60):
        matrix = torch.from_numpy(draw.choice(extremes, (1, 3, 3)))
        for rows, (interpolation, padding_mode) in itertools.product(
            (2, 3), zip((*INTERPOLATIONS, "bilinear"), PADDING_MODES, strict=True)
        ):
            found = backward_op(
                grad, images, matrix[:, :rows], interpolation, padding_mode, [0.5] * 3, False, None, [], True, True
            )
            assert found[0].isfinite().all()


def test_gradient_of_an_expanded_image() -> None:
    pixel = torch.rand(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    matrix = rotation(2, 8, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, m: affine_warp(p.expand(2, 3, 8, 9), m), (pixel, matrix))


def test_only_wanted_gradients() -> None:
    images, matrix = torch.rand(1, 2, 4, 5, requires_grad=True), torch.eye(3)[None, :2]
    affine_warp(images, matrix).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.ones_like(images))
    theta = matrix.clone().requires_grad_()
    affine_warp(images.detach(), theta).sum().backward()
    assert theta.grad is not None
    assert theta.grad.shape == matrix.shape


# --- torch's machinery ---------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    images = torch.rand(2, 3, 6, 7, requires_grad=True)
    matrix = rotation(2, 6, 7).float().requires_grad_()
    colors = torch.rand(2, 3, 4)
    arguments = ([4, 9], "bilinear", "edge", [0.1, 0.2, 0.3], True, None, colors, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    torch.library.opcheck(op, (images, matrix, *arguments, torch.float32, torch.channels_last))
    table = torch.randint(0, 256, (1, 3, 256), dtype=torch.uint8)
    levels = random_images((2, 3, 6, 7))
    torch.library.opcheck(
        op, (levels, matrix.detach(), [4, 9], "nearest", "reflect", [1.0, 2.0, 3.0], False, table, None, [], [], None,
             torch.contiguous_format),
    )  # fmt: skip
    torch.library.opcheck(
        backward_op, (torch.rand(2, 3, 4, 9), images.detach(), matrix.detach(), "bicubic", "symmetric",
                      [0.1, 0.2, 0.3], False, colors, [0.4, 0.5, 0.6], True, True),
    )  # fmt: skip


def test_compile_and_export() -> None:
    def normalised(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return affine_warp(images, matrix, size=(8, 9), mean=0.4, std=0.3, dtype=torch.float32)

    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        images, matrix = random_images((n, 3, 10, 12)), rotation(n, 10, 12)
        assert torch.equal(compiled(images, matrix), normalised(images, matrix))

    class Module(torch.nn.Module):
        def forward(self, images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
            return normalised(images, matrix)

    batch = torch.export.Dim("batch", min=2, max=64)
    images, matrix = random_images((4, 3, 10, 12)), rotation(4, 10, 12)
    exported = torch.export.export(Module(), (images, matrix), dynamic_shapes=({0: batch}, {0: batch}))
    images, matrix = random_images((7, 3, 10, 12)), rotation(7, 10, 12)
    assert torch.equal(exported.module()(images, matrix), normalised(images, matrix))


def test_compiled_gradient() -> None:
    images, matrix = torch.rand(2, 3, 6, 7), rotation(2, 6, 7).float()

    def loss(i: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return affine_warp(i, m).square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        i, m = images.clone().requires_grad_(), matrix.clone().requires_grad_()
        function(i, m).backward()
        found.append((i.grad, m.grad))
    torch.testing.assert_close(found[0], found[1])


def test_autocast() -> None:
    matrix = rotation(1, 6, 7).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix).dtype == torch.bfloat16
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix, dtype=torch.float32).dtype == torch.float32
        assert affine_warp(torch.rand(1, 3, 6, 7), matrix.bfloat16()).dtype == torch.bfloat16
        assert affine_warp(random_images((1, 3, 6, 7)), matrix).dtype == torch.uint8
        images = torch.rand(1, 3, 6, 7, requires_grad=True)
        affine_warp(images, matrix).sum().backward()
    assert images.grad is not None
    assert images.grad.dtype == torch.float32


def test_memory_format_follows_the_input() -> None:
    images, matrix = torch.rand(2, 3, 6, 7), rotation(2, 6, 7)
    assert affine_warp(images, matrix).is_contiguous()
    last = images.contiguous(memory_format=torch.channels_last)
    assert affine_warp(last, matrix).is_contiguous(memory_format=torch.channels_last)


# --- bad input -----------------------------------------------------------------------------------------------------

U8, EYE = torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.eye(3)[None]


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "images", lambda: affine_warp([1], EYE)),  # type: ignore[arg-type]
        (ValueError, "images", lambda: affine_warp(U8[0], EYE)),
        (TypeError, "images", lambda: affine_warp(U8.int(), EYE)),
        (ValueError, "images", lambda: affine_warp(U8[:, :, :0], EYE, size=(2, 2))),
        (TypeError, "matrix", lambda: affine_warp(U8, None)),  # type: ignore[arg-type]
        (TypeError, "matrix", lambda: affine_warp(U8, EYE.half())),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE[0])),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.repeat(3, 1, 1))),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.clone().requires_grad_())),
        (ValueError, "matrix", lambda: affine_warp(U8, EYE.to("meta"))),
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=3)),  # type: ignore[arg-type]
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=(3, -1))),
        (ValueError, "size", lambda: affine_warp(U8, EYE, size=(3, 1 << 30))),
        (ValueError, "interpolation", lambda: affine_warp(U8, EYE, interpolation="linear")),
        (ValueError, "padding_mode", lambda: affine_warp(U8, EYE, padding_mode="zeros")),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=256)),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=float("nan"))),
        (ValueError, "fill", lambda: affine_warp(U8, EYE, fill=[1, 2])),
        (TypeError, "fill", lambda: affine_warp(U8, EYE, fill="black")),  # type: ignore[arg-type]
        (ValueError, "mean, std", lambda: affine_warp(U8, EYE, mean=0.5)),
        (ValueError, "std", lambda: affine_warp(U8, EYE, std=0.0, dtype=torch.float32)),
        (ValueError, "std", lambda: affine_warp(U8, EYE, std=[1, 2], dtype=torch.float32)),
        (ValueError, "mean", lambda: affine_warp(U8, EYE, mean=float("nan"), dtype=torch.float32)),
        (TypeError, "dtype", lambda: affine_warp(U8, EYE, dtype=torch.int64)),
        (TypeError, "table", lambda: affine_warp(U8.float(), EYE, table=torch.zeros(1, 3, 256, dtype=torch.uint8))),
        (TypeError, "table", lambda: affine_warp(U8, EYE, table=torch.zeros(1, 3, 256))),
        (ValueError, "table", lambda: affine_warp(U8, EYE, table=torch.zeros(1, 2, 256, dtype=torch.uint8))),
        (ValueError, "color_matrix", lambda: affine_warp(U8[:, :2], EYE, color_matrix=torch.zeros(1, 3, 4))),
        (ValueError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 4, 4))),
        (TypeError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 3, 4).half())),
        (ValueError, "color_matrix", lambda: affine_warp(U8, EYE, color_matrix=torch.zeros(1, 3, 4).requires_grad_())),
        (ValueError, "memory_format", lambda: affine_warp(U8, EYE, memory_format=torch.preserve_format)),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], name: str, call: Any) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        call()


# --- the NumPy face ------------------------------------------------------------------------------------------------


def test_numpy_equals_torch() -> None:
    images, matrix = random_images((2, 3, 20, 31)), rotation(2, 20, 31)
    last = images.permute(0, 2, 3, 1).numpy()
    options: dict[str, Any] = {"size": (25, 19), "padding_mode": "reflect", "interpolation": "bicubic"}
    assert np.array_equal(
        imgopt_fast.numpy.affine_warp(last, matrix.numpy(), **options),
        affine_warp(images, matrix, **options).permute(0, 2, 3, 1).numpy(),
    )
    table = torch.randint(0, 256, (2, 3, 256), dtype=torch.uint8)
    colors = torch.rand(1, 3, 4)
    options |= {"fill": [1, 2, 3], "mean": 0.4, "std": [0.1, 0.2, 0.3], "antialias": True}
    expected = affine_warp(
        images, matrix[:1], table=table, color_matrix=colors, dtype=torch.float16, **options
    ).numpy()  # fmt: skip
    arrays = {"table": table.numpy(), "color_matrix": colors.numpy(), "dtype": np.float16}
    assert np.array_equal(
        imgopt_fast.numpy.affine_warp(last, matrix[0].numpy(), channels_first=True, **options, **arrays), expected
    )
    one = imgopt_fast.numpy.affine_warp(last[1], matrix[0].numpy(), **options, **(arrays | {"table": table[1].numpy()}))
    assert np.array_equal(one, expected[1].transpose(1, 2, 0))


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_numpy_strides(dtype: Any) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 12, 15, 3)).astype(dtype)
    eye = np.eye(3)
    for view in (images[::-1, :, ::-1], images[:, 2:9, 1:12:3, ::2], images.transpose(0, 2, 1, 3)):
        assert np.array_equal(imgopt_fast.numpy.affine_warp(view, eye), view)
    raw = np.zeros(images.nbytes + 1, np.uint8)[1:].view(dtype).reshape(images.shape)  # not aligned
    raw[:] = images
    assert np.array_equal(imgopt_fast.numpy.affine_warp(raw, eye), images)


IMAGE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("error", "name", "call"),
    [
        (TypeError, "images", lambda f: f([1], np.eye(3))),
        (ValueError, "images", lambda f: f(IMAGE[0], np.eye(3))),
        (TypeError, "images", lambda f: f(IMAGE.astype(int), np.eye(3))),
        (ValueError, "images", lambda f: f(IMAGE[:0], np.eye(3))),
        (ValueError, "matrix", lambda f: f(IMAGE, np.eye(4))),
        (ValueError, "matrix", lambda f: f(IMAGE, np.full((2, 3), np.nan))),
        (TypeError, "matrix", lambda f: f(IMAGE, np.eye(3, dtype=int))),
        (ValueError, "size", lambda f: f(IMAGE, np.eye(3), size=(1, -2))),
        (ValueError, "fill", lambda f: f(IMAGE, np.eye(3), fill=-1)),
        (ValueError, "mean, std", lambda f: f(IMAGE, np.eye(3), std=2)),
        (TypeError, "dtype", lambda f: f(IMAGE, np.eye(3), dtype=np.int32)),
        (ValueError, "table", lambda f: f(IMAGE, np.eye(3), table=np.zeros((2, 256), np.uint8))),
        (ValueError, "color_matrix", lambda f: f(IMAGE, np.eye(3), color_matrix=np.eye(3))),
    ],
)
def test_numpy_bad_input(error: type[Exception], name: str, call: Any) -> None:
    with pytest.raises(error, match=rf"^{name}: "):
        call(imgopt_fast.numpy.affine_warp)


def test_numpy_needs_no_torch() -> None:
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend runs through torch")
    code = (
        "import sys, numpy as np, imgopt_fast.numpy as f; x = np.ones((4, 5, 3), np.uint8); "
        "assert (f.affine_warp(x, np.eye(3)) == x).all(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
