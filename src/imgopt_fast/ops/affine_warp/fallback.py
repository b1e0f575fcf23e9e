"""affine_warp as a just-in-time kernel, for installations without a compiler.

One pass over memory like the C++ kernels, block by block: where the pixels lie, their taps copied side by side, then
the sums, the colours and the rounding in loops without a branch, which LLVM turns into vectors (it does not do that
with loads from everywhere). Float64, or float32 from levels to levels: results agree with the C++ kernels within the
stated bounds, not bit by bit. Memory is passed flat with its strides: a specialisation then depends on the dtypes
alone, and each costs seconds to compile. Table and box filter, which the kernel does not know, are the reference's; so
is the backward.
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
LOST = -(1 << 40)  # the column of a pixel whose coordinates are not finite
GRAIN = 16384  # output values worth a thread
BLOCK = 256  # pixels: the taps of a bilinear RGB block take 3 KB, those of a bicubic one 12

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
    # A level is off by 255 · 2^-23 at most in float32; normalised values want more, and so do colour matrices.
    narrow = levels and dtype == torch.uint8 and color_matrix is None
    real = np.empty(0, np.float32 if narrow else np.float64)
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
                colors, scale, offset, fills, *modes, levels, dtype == torch.uint8, first, real, begin, end,
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
def _warp_rows(
    source: Any, strides: Any, height: int, width: int, out: Any, out_strides: Any, channels: int, out_height: int,
    out_width: int, maps: Any, colors: Any, scale: Any, offset: Any, fill: Any, interpolation: int, padding: int,
    levels: bool, to_levels: bool, first: int, real: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Output rows [begin, end), counted over the images from number `first` on; sums in the dtype of `real`."""
    support = 4 if interpolation == BICUBIC else 2 if interpolation == BILINEAR else 1
    columns, rows, lost = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    offsets = np.empty(BLOCK, np.uintp)  # unsigned: Numba then leaves out the wrap of negative indices
    fx, fy = np.empty(BLOCK), np.empty(BLOCK)
    taps = np.empty((support, support, channels, BLOCK), source.dtype)
    weights = np.empty((support, support, BLOCK), real.dtype)
    values = np.empty((channels, BLOCK), real.dtype)
    done = np.empty(BLOCK, out.dtype)
    colored = len(colors) > 0
    unit = 1.0 if colored or not levels else 1.0 / 255.0  # of a sum, or of a coloured value in [0, 1]
    factor, add = np.empty(channels, real.dtype), np.empty(channels, real.dtype)
    for c in range(channels):
        factor[c] = (1.0 if levels and not colored else 255.0) if to_levels else scale[c] * unit
        add[c] = 0.0 if to_levels else offset[c]
    for row_of_batch in range(begin, end):
        image, y = row_of_batch // out_height, row_of_batch % out_height
        base, m = image * strides[0], maps[image]
        at = (first + image) * out_strides[0] + y * out_strides[2]
        for x0 in range(0, out_width, BLOCK):
            count = min(BLOCK, out_width - x0)
            _points(m, x0, y, count, interpolation, columns, rows, fx, fy)
            found = _gather(
                source, base, strides, channels, height, width, columns, rows, fill, padding, support, count, offsets,
                taps, lost,
            )  # fmt: skip
            _weights(fx, fy, interpolation, count, weights)
            _sums(taps, weights, support, channels, count, values)
            for number in range(found):
                for c in range(channels):
                    values[c, lost[number]] = fill[c]
            if colored:
                _color(colors[first + image], 1.0 / 255.0 if levels else 1.0, count, values)
            for c in range(channels):
                _finish(values, c, factor[c], add[c], to_levels, count, done)
                to, step = np.uintp(at + x0 * out_strides[3] + c * out_strides[1]), np.uintp(out_strides[3])
                for i in range(count):
                    out[to] = done[i]
                    to += step


@jit
def _points(m: Any, x0: int, y: int, count: int, interpolation: int, columns: Any, rows: Any, fx: Any, fy: Any) -> None:
    """Where each pixel from column x0 on has its first tap, and how far past it (bicubic: the second) it lies."""
    affine = m[2, 0] == 0 and m[2, 1] == 0 and m[2, 2] == 1
    mx, my, mw = m[0, 0], m[1, 0], m[2, 0]
    cx, cy, cw = m[0, 1] * y + m[0, 2], m[1, 1] * y + m[1, 2], m[2, 1] * y + m[2, 2]
    shift, before = 0.5 if interpolation == NEAREST else 0.0, 1 if interpolation == BICUBIC else 0
    for i in range(count):
        x = float(x0 + i)
        px, py = mx * x + cx, my * x + cy
        if not affine:
            r = 1.0 / (mw * x + cw)
            px, py = px * r, py * r
        finite = abs(px) < np.inf and abs(py) < np.inf
        px = min(max(px + shift, -FAR), FAR) if finite else 0.0
        py = min(max(py + shift, -FAR), FAR) if finite else 0.0
        left, upper = np.floor(px), np.floor(py)
        columns[i] = int(left) - before if finite else LOST
        rows[i] = int(upper) - before
        fx[i], fy[i] = px - left, py - upper


@jit
def _gather(
    source: Any, base: int, strides: Any, channels: int, height: int, width: int, columns: Any, rows: Any, fill: Any,
    padding: int, support: int, count: int, offsets: Any, taps: Any, lost: Any,
) -> int:  # fmt: skip
    """The taps of `count` pixels but those that have only fill: `lost` gets their numbers; returns how many."""
    _, sc, sy, sx = strides
    most_x, most_y = width - support, height - support
    inner = 0
    for i in range(count):
        inside = (columns[i] >= 0) & (columns[i] <= most_x) & (rows[i] >= 0) & (rows[i] <= most_y)
        offsets[i] = base + rows[i] * sy + columns[i] * sx if inside else base  # what is read there is replaced
        inner += inside
    if inner > 0:
        for j in range(support):
            for k in range(support):
                for c in range(channels):
                    tap = np.uintp(j * sy + k * sx + c * sc)
                    for i in range(count):
                        taps[j, k, c, i] = source[offsets[i] + tap]
    if inner == count:
        return 0
    outside = 0
    for i in range(count):
        lost[outside] = i
        outside += (columns[i] < 0) | (columns[i] > most_x) | (rows[i] < 0) | (rows[i] > most_y)
    found = 0
    for number in range(outside):
        i = lost[number]
        column, row = columns[i], rows[i]
        touches = -support < column < width and -support < row < height
        if column == LOST or (padding == CONSTANT and not touches):
            lost[found] = i
            found += 1
            continue
        for k in range(support):
            x = _fold(column + k, width, padding)
            for j in range(support):
                y = _fold(row + j, height, padding)
                at = np.uintp(base + y * sy + x * sx)
                for c in range(channels):
                    taps[j, k, c, i] = fill[c] if x < 0 or y < 0 else source[at]
                    at += np.uintp(sc)
    return found


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
def _weights(fx: Any, fy: Any, interpolation: int, count: int, weights: Any) -> None:
    """The weight of each tap, (row, column, pixel)."""
    if interpolation == NEAREST:
        for i in range(count):
            weights[0, 0, i] = 1.0
    elif interpolation == BILINEAR:
        for i in range(count):
            x, y = fx[i], fy[i]
            weights[0, 0, i], weights[0, 1, i] = (1.0 - y) * (1.0 - x), (1.0 - y) * x
            weights[1, 0, i], weights[1, 1, i] = y * (1.0 - x), y * x
    else:
        for i in range(count):
            wx, wy = _keys(fx[i]), _keys(fy[i])
            for j in range(4):
                for k in range(4):
                    weights[j, k, i] = wy[j] * wx[k]


@jit
def _keys(f: float) -> tuple[float, float, float, float]:
    a, g = reference.A, 1.0 - f
    return (
        a * f * g * g, ((a + 2) * f - (a + 3)) * f * f + 1, ((a + 2) * g - (a + 3)) * g * g + 1, a * g * f * f
    )  # fmt: skip


@jit
def _sums(taps: Any, weights: Any, support: int, channels: int, count: int, values: Any) -> None:
    for c in range(channels):
        for i in range(count):
            values[c, i] = 0.0
        for j in range(support):
            for k in range(support):
                for i in range(count):
                    values[c, i] += weights[j, k, i] * values.dtype.type(taps[j, k, c, i])


@jit
def _color(m: Any, unit: float, count: int, values: Any) -> None:
    for i in range(count):
        r, g, b = values[0, i] * unit, values[1, i] * unit, values[2, i] * unit
        for c in range(3):
            v = m[4 * c] * r + m[4 * c + 1] * g + m[4 * c + 2] * b + m[4 * c + 3]
            values[c, i] = min(max(v, 0.0), 1.0) if v == v else v


@jit
def _finish(values: Any, c: int, factor: float, add: float, to_levels: bool, count: int, done: Any) -> None:
    none, most = values.dtype.type(0.0), values.dtype.type(255.0)
    for i in range(count):
        v = values[c, i] * factor + add
        if to_levels:
            v = v if v > none else none  # NaN too
            v = np.rint(v if v < most else most)
        done[i] = v
