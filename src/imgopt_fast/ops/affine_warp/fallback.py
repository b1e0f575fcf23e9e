"""affine_warp as a just-in-time kernel, for installations without a compiler.

One pass over memory like the C++ kernels, in float64 scalars, so results agree with them within the stated bounds, not
bit by bit. Memory is passed flat with its strides: a specialisation then depends on the dtypes alone, and each costs
seconds to compile. Table and box filter, which the kernel does not know, are the reference's; so is the backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast._parallel import parallel_for
from imgopt_fast.ops.affine_warp import reference
from imgopt_fast.ops.affine_warp.reference import affine_warp_backward

__all__ = ["affine_warp", "affine_warp_backward"]

NEAREST, BILINEAR, BICUBIC = range(3)
CONSTANT, EDGE, REFLECT, SYMMETRIC = range(4)
INTERPOLATIONS = {"nearest": NEAREST, "bilinear": BILINEAR, "bicubic": BICUBIC}
PADDING_MODES = {"constant": CONSTANT, "edge": EDGE, "reflect": REFLECT, "symmetric": SYMMETRIC}
FAR = float(1 << 30)  # coordinates are clamped to it, as in csrc/affine_warp/arithmetic.h
GRAIN = 16384  # output values worth a thread
# Levels to levels go by fractions of 15 bits in integers, three multiplications a channel and no conversion: a tenth
# of the time less. A fraction is off by 2^-16 at most, a level by 0.008.
BITS = 15
ONE, HALF = float(1 << BITS), 1 << 2 * BITS - 1

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def affine_warp(
    images: torch.Tensor, matrix: torch.Tensor, size: Sequence[int], interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool, table: torch.Tensor | None, color_matrix: torch.Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None, memory_format: torch.memory_format,
) -> torch.Tensor:  # fmt: skip
    """The operation `imgopt_fast::affine_warp`; see `imgopt_fast.affine_warp` for the arguments."""
    dtype = dtype or images.dtype
    n, channels = images.shape[:2]
    if table is not None:
        images = table.expand(n, -1, -1).gather(2, images.flatten(2).long()).view_as(images)
    direct = dtype not in (torch.float16, torch.bfloat16)  # NumPy lacks one of them, Numba the other
    output = torch.empty((n, channels, *size), dtype=dtype if direct else torch.float32, memory_format=memory_format)
    maps = torch.zeros((n, 3, 3), dtype=torch.float64)
    maps[:, 2, 2] = 1
    maps[:, : matrix.shape[1]] = matrix.double()
    colors = (
        np.zeros((0, 12)) if color_matrix is None else color_matrix.double().expand(n, -1, -1).numpy().reshape(n, 12)
    )
    levels = images.dtype == torch.uint8
    scale = np.array([1 / s for s in std] or [1.0] * channels)
    offset = np.array([-m / s for m, s in zip(mean, std, strict=True)] or [-0.0] * channels)
    modes = (INTERPOLATIONS[interpolation], PADDING_MODES[padding_mode])
    fills = np.array(fill, dtype=np.float64)

    def warp(source: torch.Tensor, first: int, last: int, m: NDArray[np.float64]) -> None:
        """Images [first, last) of the output from `source`, which begins with the first of them."""
        flat, strides = _flat(source)
        out, out_strides = _flat(output)
        rows = (last - first) * size[0]
        parallel_for(
            rows, max(1, GRAIN // max(1, channels * size[1])),
            lambda begin, end: _warp_rows(
                flat, strides, source.shape[2], source.shape[3], out, out_strides, channels, size[0], size[1], m,
                colors, scale, offset, fills, *modes, levels, dtype == torch.uint8, first, begin, end,
            ),
        )  # fmt: skip

    if output.numel() == 0:
        pass
    elif not antialias:
        warp(_readable(images), 0, n, maps.numpy())
    else:
        for i in range(n):
            ky, kx = reference.minification(maps[i], size)
            ky, kx = min(ky, images.shape[2]), min(kx, images.shape[3])
            box = torch.eye(3, dtype=torch.float64)
            box[0, 0], box[0, 2], box[1, 1], box[1, 2] = 1 / kx, -(kx - 1) / 2 / kx, 1 / ky, -(ky - 1) / 2 / ky
            source = reference.decimated(images[i : i + 1], ky, kx) if ky * kx > 1 else images[i : i + 1]
            warp(_readable(source), i, i + 1, (box @ maps[i])[None].numpy() if ky * kx > 1 else maps[i : i + 1].numpy())
    return output if direct else output.to(dtype)


def _readable(images: torch.Tensor) -> torch.Tensor:
    """Dense, contiguous or channels_last, in a dtype that Numba reads."""
    if images.dtype in (torch.float16, torch.bfloat16):
        images = images.float()
    return images if images.is_contiguous(memory_format=torch.channels_last) else images.contiguous()


def _flat(images: torch.Tensor) -> tuple[NDArray[Any], tuple[int, int, int, int]]:
    """The memory of a dense tensor as one array, and its strides."""
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    memory = images.permute(0, 2, 3, 1) if last else images
    _, c, h, w = images.shape
    return memory.reshape(-1).numpy(), (c * h * w, 1, w * c, c) if last else (c * h * w, h * w, w, 1)


@jit
def _fold(i: int, n: int, padding: int) -> int:
    """Index of the pixel that serves index `i` of an axis of `n`, -1 where it is fill."""
    if 0 <= i < n:
        return i
    if padding == CONSTANT:
        return -1
    if padding == EDGE or n == 1:
        return 0 if i < 0 else n - 1
    period = 2 * n - 2 if padding == REFLECT else 2 * n
    i %= period
    return i if i < n else (period if padding == REFLECT else period - 1) - i


@jit
def _taps(t: float, interpolation: int, padding: int, n: int, index: Any, weight: Any) -> int:
    """Fills index and weight of every pixel that the point `t` reads along one axis; returns how many."""
    t = min(max(t, -FAR), FAR)
    if interpolation == NEAREST:
        index[0] = _fold(int(np.floor(t + 0.5)), n, padding)
        weight[0] = 1.0
        return 1
    base = np.floor(t)
    f = t - base
    g = 1.0 - f
    i = int(base)
    if interpolation == BILINEAR:
        index[0], index[1] = _fold(i, n, padding), _fold(i + 1, n, padding)
        weight[0], weight[1] = g, f
        return 2
    for k in range(4):
        index[k] = _fold(i - 1 + k, n, padding)
    a = reference.A
    weight[0], weight[3] = a * f * g * g, a * g * f * f
    weight[1], weight[2] = ((a + 2) * f - (a + 3)) * f * f + 1, ((a + 2) * g - (a + 3)) * g * g + 1
    return 4


@jit
def _sample(
    source: Any, base: int, strides: Any, channels: int, height: int, width: int, px: float, py: float, fill: Any,
    interpolation: int, padding: int, taps: Any, values: Any,
) -> None:  # fmt: skip
    """Any point, any mode."""
    _, sc, sy, sx = strides
    column, row, wx, wy = taps
    nx = _taps(px, interpolation, padding, width, column, wx)
    ny = _taps(py, interpolation, padding, height, row, wy)
    for c in range(channels):
        total = 0.0
        for i in range(ny):
            for j in range(nx):
                if row[i] < 0 or column[j] < 0:
                    total += wy[i] * wx[j] * fill[c]
                else:
                    total += wy[i] * wx[j] * source[base + c * sc + row[i] * sy + column[j] * sx]
        values[c] = total


@jit
def _color(m: Any, unit: float, values: Any) -> None:
    r, g, b = values[0] * unit, values[1] * unit, values[2] * unit
    for c in range(3):
        v = m[4 * c] * r + m[4 * c + 1] * g + m[4 * c + 2] * b + m[4 * c + 3]
        values[c] = min(max(v, 0.0), 1.0) if v == v else v


@jit
def _warp_rows(
    source: Any, strides: Any, height: int, width: int, out: Any, out_strides: Any, channels: int, out_height: int,
    out_width: int, maps: Any, colors: Any, scale: Any, offset: Any, fill: Any, interpolation: int, padding: int,
    levels: bool, to_levels: bool, first: int, begin: int, end: int,
) -> None:  # fmt: skip
    """Output rows [begin, end), counted over the images from number `first` on."""
    taps = np.empty(4, np.int64), np.empty(4, np.int64), np.empty(4), np.empty(4)
    values = np.empty(max(channels, 3))
    sn, sc, sy, sx = strides
    inner_x, inner_y = (width - 1.0, height - 1.0) if interpolation == BILINEAR else (0.0, 0.0)
    right, below, next_plane, next_plane_out = np.uintp(sx), np.uintp(sy), np.uintp(sc), np.uintp(out_strides[1])
    reach = 2.0 if interpolation == BICUBIC else 1.0
    unit = 1.0 / 255.0 if levels else 1.0
    colored = len(colors) > 0
    integers = levels and to_levels and not colored
    factor, add = np.empty(channels), np.empty(channels)
    for c in range(channels):  # of a sample, or of a coloured value in [0, 1]
        factor[c] = 255.0 * (1.0 if colored else unit) if to_levels else scale[c] * (1.0 if colored else unit)
        add[c] = 0.0 if to_levels else offset[c]
    for row_of_batch in range(begin, end):
        image, y = row_of_batch // out_height, row_of_batch % out_height
        m = maps[image]
        affine = m[2, 0] == 0 and m[2, 1] == 0 and m[2, 2] == 1
        cx, cy, cw = m[0, 1] * y + m[0, 2], m[1, 1] * y + m[1, 2], m[2, 1] * y + m[2, 2]
        mx, my, mw = m[0, 0], m[1, 0], m[2, 0]
        base = image * sn
        at = (first + image) * out_strides[0] + y * out_strides[2]
        for x in range(out_width):
            px, py = mx * x + cx, my * x + cy
            if not affine:
                r = 1.0 / (mw * x + cw)
                px, py = px * r, py * r
            if px >= 0.0 and px < inner_x and py >= 0.0 and py < inner_y:
                ix, iy = int(px), int(py)
                fx, fy = px - ix, py - iy
                k = np.uintp(base + iy * sy + ix * sx)  # unsigned: Numba then leaves out the wrap of negative indices
                to = np.uintp(at)
                if integers:
                    wx, wy = int(fx * ONE + 0.5), int(fy * ONE + 0.5)
                    for _ in range(channels):
                        p00, p10 = np.int64(source[k]), np.int64(source[k + below])
                        upper = (p00 << BITS) + wx * (np.int64(source[k + right]) - p00)
                        lower = (p10 << BITS) + wx * (np.int64(source[k + below + right]) - p10)
                        level = (upper << BITS) + wy * (lower - upper) + HALF
                        rounded = level >> 2 * BITS
                        if level & (2 * HALF - 1) == 0:
                            rounded &= ~1  # half to even
                        out[to] = rounded
                        k += next_plane
                        to += next_plane_out
                    at += out_strides[3]
                    continue
                w11 = fx * fy
                w01, w10, w00 = fx - w11, fy - w11, 1.0 - fx - fy + w11
                for c in range(channels):
                    v = source[k] * w00 + source[k + right] * w01
                    v += source[k + below] * w10 + source[k + below + right] * w11
                    k += next_plane
                    if colored:
                        values[c] = v
                    else:
                        v = v * factor[c] + add[c]
                        out[to] = np.rint(min(max(v, 0.0), 255.0)) if to_levels else v
                        to += next_plane_out
                if not colored:
                    at += out_strides[3]
                    continue
            elif padding == CONSTANT and not (
                px > -reach and px < width + reach and py > -reach and py < height + reach
            ):
                for c in range(channels):  # no tap inside; NaN comes here too
                    values[c] = fill[c]
            elif np.isfinite(px) and np.isfinite(py):
                _sample(
                    source, base, strides, channels, height, width, px, py, fill, interpolation, padding, taps, values
                )
            else:
                for c in range(channels):
                    values[c] = fill[c]
            if colored:
                _color(colors[first + image], unit, values)
            for c in range(channels):
                v = values[c] * factor[c] + add[c]
                if to_levels:
                    v = np.rint(min(max(v, 0.0), 255.0)) if v == v else 0.0
                out[at + c * out_strides[1]] = v
            at += out_strides[3]
