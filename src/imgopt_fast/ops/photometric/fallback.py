"""Hue and sharpness in Numba, pixel by pixel in float32, and statistics in NumPy: where no compiler was found."""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast._parallel import parallel_for

Pixels = NDArray[Any]
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_GRAIN = 1 << 14  # pixels worth a thread


@_compiled
def _hue(images: Pixels, turn: Pixels, output: Pixels, rounds: bool, begin: int, end: int) -> None:
    for n in range(begin, end):
        t = turn[n]
        largest = t - np.float32(3)
        following = t - np.float32(5) if t > 2 else t + np.float32(1)
        last = t - np.float32(7) if t > 4 else t - np.float32(1)
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                r, g, b = (
                    np.float32(images[n, 0, y, x]), np.float32(images[n, 1, y, x]), np.float32(images[n, 2, y, x])
                )  # fmt: skip
                value, low = max(r, g, b), min(r, g, b)
                chroma = value - low
                if value == r:
                    difference, places = g - b, (largest, following, last)
                elif value == g:
                    difference, places = b - r, (last, largest, following)
                else:
                    difference, places = r - g, (following, last, largest)
                for c in range(3):
                    far = low - chroma + abs(difference + chroma * places[c])
                    turned = min(value, max(low, far))
                    output[n, c, y, x] = np.rint(turned) if rounds else turned


@_compiled
def _sharpness(images: Pixels, weight: Pixels, output: Pixels, most: float, rounds: bool, begin: int, end: int) -> None:
    channels, height, width = images.shape[1:]
    for unit in range(begin, end):
        n, c = unit // channels, unit % channels
        for y in range(height):
            for x in range(width):
                at = np.float32(images[n, c, y, x])
                if 0 < y < height - 1 and 0 < x < width - 1:
                    total = np.float32(0)
                    for j in range(-1, 2):
                        for i in range(-1, 2):
                            total += np.float32(images[n, c, y + j, x + i])
                    at = min(max(at + weight[n] * (total - np.float32(9) * at), np.float32(0)), np.float32(most))
                output[n, c, y, x] = np.rint(at) if rounds else at


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::adjust_hue` on the CPU."""
    turn = (6 * (shift - shift.floor())).to(torch.float32).numpy()
    source, output = _dense(images)
    pixels, results, rounds = source.numpy(), output.numpy(), images.dtype == torch.uint8
    area = max(1, images.shape[2] * images.shape[3])
    parallel_for(len(images), 1 + _GRAIN // area, lambda begin, end: _hue(pixels, turn, results, rounds, begin, end))
    return output


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::adjust_sharpness` on the CPU."""
    weight = ((1 - factor) / 13).to(torch.float32).numpy()
    source, output = _dense(images)
    pixels, results, rounds = source.numpy(), output.numpy(), images.dtype == torch.uint8
    area = max(1, images.shape[2] * images.shape[3])
    most = 255.0 if rounds else 1.0
    parallel_for(
        len(images) * images.shape[1],
        1 + _GRAIN // area,
        lambda begin, end: _sharpness(pixels, weight, results, most, rounds, begin, end),
    )
    return output


def apply_table(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::apply_table` on the CPU."""
    source, output = _dense(images)
    tables = table.expand(len(images), -1, -1).numpy()
    for image, levels, result in zip(source.numpy(), tables, output.numpy(), strict=True):
        for plane, row, to in zip(image, levels, result, strict=True):
            np.take(row, plane, out=to, mode="clip")  # every index is a byte
    return output


ROWS_IN_16_BITS = 257  # 257 · 255 = 2^16 - 1


def channel_sums(images: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::channel_sums` on the CPU."""
    n, channels, height, width = images.shape
    if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
        columns = _column_sums(images.permute(0, 2, 3, 1).numpy().reshape(n, height, width * channels))
        sums = columns.reshape(n, width, channels).sum(axis=1)
    else:
        sums = _column_sums(images.numpy().reshape(n * channels, height, width)).sum(axis=1).reshape(n, channels)
    return torch.from_numpy(sums.astype(np.int64))


def _column_sums(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Sums over axis 1, as many rows at a time as 16 bits hold: NumPy adds those in vectors twice as long."""
    total = np.zeros((rows.shape[0], rows.shape[2]), np.uint64)
    for first in range(0, rows.shape[1], ROWS_IN_16_BITS):
        total += rows[:, first : first + ROWS_IN_16_BITS].sum(axis=1, dtype=np.uint16)
    return total


def level_histogram(images: torch.Tensor) -> torch.Tensor:
    """The operation `imgopt_fast::level_histogram` on the CPU."""
    planes = images.flatten(0, 1).flatten(1).numpy()
    counts = [np.bincount(plane, minlength=256) for plane in planes]
    stacked = np.stack(counts) if counts else np.empty((0, 256), np.int64)
    return torch.from_numpy(stacked.astype(np.int64)).view(*images.shape[:2], 256)


def _dense(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    interleaved = images.shape[1] > 1 and images.stride(1) == 1
    source = images.contiguous(memory_format=torch.channels_last if interleaved else torch.contiguous_format)
    return source, torch.empty_like(source)
