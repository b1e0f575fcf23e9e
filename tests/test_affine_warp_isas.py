"""affine_warp on every instruction set: the same bits for any map, and nothing read outside the images."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import neon_units
import numpy as np
import pytest
import torch
from conftest import BACKEND
from hypothesis import given, settings
from hypothesis import strategies as st
from warp_problems import homography, layout, random_images, rotation

from imgopt_fast import _native, affine_warp
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES

pytestmark = pytest.mark.usefixtures("one_thread")


BIG = [1e4, -1e9, 1e15, 1e300, -1e308, float("inf"), float("-inf"), float("nan"), 0.0, 1e-320]


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
    """The AVX-512 unit looks taps up in 15 x 12 or 15 x 16 source pixels per 8 x 8 outputs: sides around those, scales
    around the last that fit, blocks inside, at the border, beyond it and cut off, and homographies that fit in part."""
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend has no instruction sets")
    before = _native.active_isa()
    assert before is not None
    generator = np.random.default_rng(4)
    for i in range(240):
        channels, nearest = (1, 3, 4, 3, 1, 4, 2, 3, 6)[i % 9], i % 2
        height, width = (int(v) for v in generator.integers(10, 48, 2))
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
            "fill": [9.0, 200.0, 31.0, 77.0, 5.0, 0.0][:channels],
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


def test_nothing_outside_the_image_is_read(isa_or_backend: str) -> None:
    if BACKEND != "native" or not sys.platform.startswith("linux"):
        pytest.skip("guarded pages are set up for native kernels on Linux")
    environment = {**os.environ, "IMGOPT_ISA": isa_or_backend}
    done = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert "read nothing else" in done.stdout


def test_neon_unit_in_an_emulator(tmp_path: Path) -> None:
    assert neon_units.compared("affine_warp", tmp_path) == "1728 cases, 0 differ\n"
