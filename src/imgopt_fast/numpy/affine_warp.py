"""`affine_warp` on NumPy arrays."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgopt_fast import _native
from imgopt_fast._arguments import described, normalization, one_of, per_channel, uint8_fill, warp_size

_PIXELS = ("uint8", "float16", "float32", "float64")


def affine_warp(
    images: NDArray[Any],
    matrix: NDArray[Any],
    *,
    size: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    antialias: bool = False,
    table: NDArray[np.uint8] | None = None,
    color_matrix: NDArray[Any] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: Any = None,
    channels_first: bool = False,
) -> NDArray[Any]:
    """`imgopt_fast.affine_warp` for arrays: the same arguments and results, with channels last.

    Args:
        images: (N, H, W, C) or (H, W, C), uint8, float16, float32 or float64; any strides.
        matrix: (N or 1, 2 or 3, 3), or (2 or 3, 3) for all images; floating, finite. Output to input, x before y,
            pixel centres at integers.
        size, interpolation, padding_mode, fill, antialias, mean, std: as in `imgopt_fast.affine_warp`.
        table: (N or 1, C, 256) or (C, 256) uint8.
        color_matrix: (N or 1, 3, 4) or (3, 4), floating, finite.
        dtype: of the output; the input's by default.
        channels_first: return (N, C, H, W) or (C, H, W), as networks take it.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value; the text names it.
    """
    _check_images(images)
    batch = images if images.ndim == 4 else images[None]
    n, height, width, channels = batch.shape
    out_height, out_width = warp_size(size, height, width, Integral)
    one_of("interpolation", interpolation, ("nearest", "bilinear", "bicubic"))
    one_of("padding_mode", padding_mode, ("constant", "edge", "reflect", "symmetric"))
    fills = per_channel("fill", fill, channels)
    if images.dtype == np.uint8:
        fills = uint8_fill(fills)
    means, stds = normalization(mean, std, channels)
    out_dtype = _output_dtype(dtype, images.dtype)
    if stds and out_dtype == np.uint8:
        raise ValueError("mean, std: expected a floating output, got dtype uint8; pass dtype=np.float32")
    homographies = _homographies(matrix, n)
    tables = None if table is None else _tables(table, batch)
    colors = None if color_matrix is None else _color_matrices(color_matrix, batch)
    if _native.backend() != "native":
        result = _affine_warp_by_torch(
            batch, homographies, (out_height, out_width), interpolation, padding_mode, fills, antialias, tables, colors,
            means, stds, out_dtype,
        )  # fmt: skip
    else:
        core = _native.core()
        assert core is not None
        if not batch.flags.aligned or any(s < 0 or s % batch.itemsize for s in batch.strides):
            batch = np.ascontiguousarray(batch)
        if channels_first:
            result = np.empty((n, channels, out_height, out_width), out_dtype)
        else:
            result = np.empty((n, out_height, out_width, channels), out_dtype).transpose(0, 3, 1, 2)
        core.affine_warp(
            batch.transpose(0, 3, 1, 2), result, homographies, interpolation, padding_mode, fills, antialias, tables,
            colors, means, stds,
        )  # fmt: skip
    if not channels_first:
        result = result.transpose(0, 2, 3, 1)
    return result if images.ndim == 4 else result[0]


def _check_images(images: NDArray[Any]) -> None:
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images: expected a NumPy array, got {type(images).__name__}")
    if images.ndim not in (3, 4):
        raise ValueError(f"images: expected shape (N, H, W, C) or (H, W, C), got {images.shape}")
    if not _is_pixel(images.dtype):
        raise TypeError(f"images: expected one of {', '.join(_PIXELS)}, got {images.dtype}")


def _is_pixel(dtype: np.dtype[Any]) -> bool:
    return dtype.name in _PIXELS and dtype.isnative


def _output_dtype(dtype: Any, default: np.dtype[Any]) -> np.dtype[Any]:
    try:
        found = default if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not _is_pixel(found):
        raise TypeError(f"dtype: expected one of {', '.join(_PIXELS)}, got {dtype}")
    return found


def _tables(table: NDArray[np.uint8], batch: NDArray[Any]) -> NDArray[np.uint8]:
    if batch.dtype != np.uint8:
        raise TypeError(f"table: expected uint8 images with it, got {batch.dtype} images")
    if not isinstance(table, np.ndarray) or table.dtype != np.uint8:
        raise TypeError(f"table: expected a uint8 array, got {described(table, np.ndarray)}")
    return np.ascontiguousarray(_leading("table", table, len(batch), [(batch.shape[3], 256)]))


def _color_matrices(color_matrix: NDArray[Any], batch: NDArray[Any]) -> NDArray[np.float64]:
    if batch.shape[3] != 3:
        raise ValueError(f"color_matrix: expected images with 3 channels, got {batch.shape[3]}")
    values = _floating("color_matrix", color_matrix)
    return np.ascontiguousarray(_leading("color_matrix", values, len(batch), [(3, 4)]))


def _homographies(matrix: NDArray[Any], n: int) -> NDArray[np.float64]:
    values = _leading("matrix", _floating("matrix", matrix), n, [(2, 3), (3, 3)])
    if values.shape[1] == 3:
        return np.ascontiguousarray(values)
    last = np.broadcast_to(np.array([[0.0, 0.0, 1.0]]), (len(values), 1, 3))
    return np.concatenate([values, last], 1)


def _floating(name: str, array: NDArray[Any]) -> NDArray[np.float64]:
    if not isinstance(array, np.ndarray) or array.dtype.name not in ("float32", "float64"):
        raise TypeError(f"{name}: expected a float32 or float64 array, got {described(array, np.ndarray)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values")
    return array.astype(np.float64)


def _leading(name: str, array: NDArray[Any], n: int, shapes: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """`array` with a leading dimension of 1 or `n`."""
    values = array if array.ndim == 3 else array[None]
    if values.ndim != 3 or values.shape[1:] not in shapes or values.shape[0] not in (1, n):
        expected = " or ".join(f"(N, {a}, {b})" for a, b in shapes)
        raise ValueError(f"{name}: expected shape {expected} with N = {n} or 1, or without N, got {array.shape}")
    return values


def _affine_warp_by_torch(
    batch: NDArray[Any], matrix: NDArray[np.float64], size: tuple[int, int], interpolation: str, padding_mode: str,
    fill: list[float], antialias: bool, table: NDArray[np.uint8] | None, colors: NDArray[np.float64] | None,
    mean: list[float], std: list[float], dtype: Any,
) -> NDArray[Any]:  # fmt: skip
    import torch

    from imgopt_fast.ops.affine_warp import affine_warp as warp

    result = warp(
        torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2),
        torch.from_numpy(matrix),
        size=size,
        interpolation=interpolation,
        padding_mode=padding_mode,
        fill=fill,
        antialias=antialias,
        table=None if table is None else torch.from_numpy(table),
        color_matrix=None if colors is None else torch.from_numpy(colors),
        mean=mean or None,
        std=std or None,
        dtype=getattr(torch, dtype.name),
    )
    found: NDArray[Any] = result.numpy()
    return found
