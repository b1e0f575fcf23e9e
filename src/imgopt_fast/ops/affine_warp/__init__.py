"""Batched affine and perspective warp with colour, normalisation, cast and layout in the same pass over memory.

A training pipeline that warps with OpenCV or `grid_sample` reads and writes every image five times or more: warp,
jitter, divide, normalise, transpose, cast. Here one call reads uint8 and writes what the network takes.
csrc/affine_warp/contract.h defines the arithmetic; the semantics of the arguments are those of `affine_warp` below.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from imgopt_fast._arguments import described, normalization, one_of, per_channel, uint8_fill, warp_size
from imgopt_fast.ops import registration
from imgopt_fast.ops.affine_warp import reference

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
PADDING_MODES = ("constant", "edge", "reflect", "symmetric")
DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def affine_warp(
    images: torch.Tensor,
    matrix: torch.Tensor,
    *,
    size: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    padding_mode: str = "constant",
    fill: float | Sequence[float] = 0.0,
    antialias: bool = False,
    table: torch.Tensor | None = None,
    color_matrix: torch.Tensor | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """Warp each image by its own matrix, and colour, normalise, cast and lay out the result in the same pass.

    The value at output column x, row y is the input sampled at `[x', y', 1] ∝ matrix · [x, y, 1]`: the matrix maps
    output to input (OpenCV's WARP_INVERSE_MAP), and pixel centres are integers.

    Args:
        images: (N, C, H, W), uint8, float16, bfloat16, float32 or float64; contiguous or channels_last. Floating
            images with a colour matrix, or with uint8 output, hold values in [0, 1].
        matrix: (N, 2, 3), or (N, 3, 3) for a homography, float32 or float64; a leading 1 serves every image.
        size: (height, width) of the output; that of the input by default.
        interpolation: "nearest" (floor(x + 0.5)), "bilinear", or "bicubic" (Keys' kernel, a = -0.75).
        padding_mode: what lies outside the image. "constant": `fill`, blended per tap; "edge": the nearest pixel;
            "reflect": mirrored about the centre of the border pixel; "symmetric": about its outer edge
            (the words of `numpy.pad` and torchvision).
        fill: a number, or one per channel, in the units of `images`; rounded to an integer for uint8 images. It is
            also the value of a pixel whose coordinate is not finite, in every padding mode. One that is not finite
            makes every pixel that it is blended into NaN.
        antialias: first average the source over boxes of kx × ky pixels, where k is the minification along that
            source axis (of a homography: at the output's centre) rounded down.
        table: (N or 1, C, 256) uint8, replaces the source pixels of uint8 images before anything else.
        color_matrix: (N or 1, 3, 4) float32 or float64, for three channels: `rgb = clamp(M[:, :3] @ rgb + M[:, 3],
            0, 1)` in units of [0, 1], after sampling, fill included.
        mean, std: numbers, or one per channel, in units of [0, 1]: `(value - mean) / std`, floating output only.
        dtype: of the output; the input's by default. From uint8 to floating divides by 255, from floating to uint8
            multiplies by 255. uint8 output rounds half to even and saturates.
        memory_format: torch.contiguous_format or torch.channels_last; the input's by default.

    Returns:
        (N, C, size[0], size[1]). Differentiable once in `images` and `matrix` for floating images and output; the
        gradient of a coordinate that lies exactly on a pixel is the one from the right.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the text names it.
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images: expected a tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"images: expected shape (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype not in DTYPES or images.layout != torch.strided:
        raise TypeError(f"images: expected a dense tensor of {_names(DTYPES)}, got {images.layout} {images.dtype}")
    _, channels, height, width = images.shape
    _check_matrix(images, matrix)
    out_height, out_width = warp_size(size, height, width, (Integral, torch.SymInt))
    one_of("interpolation", interpolation, INTERPOLATIONS)
    one_of("padding_mode", padding_mode, PADDING_MODES)
    fills = per_channel("fill", fill, channels)
    if images.dtype == torch.uint8:
        fills = uint8_fill(fills)
    means, stds = normalization(mean, std, channels)
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {_names(DTYPES)}, got {dtype}")
    if stds and (dtype or images.dtype) == torch.uint8:
        raise ValueError("mean, std: expected a floating output, got dtype uint8; pass dtype=torch.float32")
    _check_table(images, table)
    _check_color_matrix(images, color_matrix)
    if memory_format is None:
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
    elif memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected torch.contiguous_format or torch.channels_last, got {memory_format}")
    return _op(  # type: ignore[no-any-return]
        images, matrix, [out_height, out_width], interpolation, padding_mode, fills, antialias, table, color_matrix,
        means, stds, dtype, memory_format,
    )  # fmt: skip


def _check_matrix(images: torch.Tensor, matrix: torch.Tensor) -> None:
    if not isinstance(matrix, torch.Tensor):
        raise TypeError(f"matrix: expected a tensor, got {type(matrix).__name__}")
    if matrix.dim() != 3 or matrix.shape[1:] not in ((2, 3), (3, 3)) or matrix.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"matrix: expected shape (N, 2, 3) or (N, 3, 3) with N = {images.shape[0]} or 1, got {tuple(matrix.shape)}"
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        # Under autocast a matrix that a network has predicted comes in low precision; the operation widens it.
        low = matrix.dtype in (torch.float16, torch.bfloat16)
        if not (low and torch.is_autocast_enabled(images.device.type)):
            raise TypeError(f"matrix: expected torch.float32 or torch.float64, got {matrix.dtype}")
    _check_device(images, "matrix", matrix)
    if images.dtype == torch.uint8 and matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError("matrix: gradients need floating images, got uint8 images; convert them or detach the matrix")


def _check_table(images: torch.Tensor, table: torch.Tensor | None) -> None:
    if table is None:
        return
    if images.dtype != torch.uint8:
        raise TypeError(f"table: expected uint8 images with it, got {images.dtype} images")
    if not isinstance(table, torch.Tensor) or table.dtype != torch.uint8:
        raise TypeError(f"table: expected a uint8 tensor, got {described(table, torch.Tensor)}")
    n, channels = images.shape[:2]
    if table.dim() != 3 or table.shape[1:] != (channels, 256) or table.shape[0] not in (1, n):
        raise ValueError(
            f"table: expected shape (N, C, 256) with N = {n} or 1 and C = {channels}, got {tuple(table.shape)}"
        )
    _check_device(images, "table", table)


def _check_color_matrix(images: torch.Tensor, color_matrix: torch.Tensor | None) -> None:
    if color_matrix is None:
        return
    if not isinstance(color_matrix, torch.Tensor) or color_matrix.dtype not in (torch.float32, torch.float64):
        got = described(color_matrix, torch.Tensor)
        raise TypeError(f"color_matrix: expected a float32 or float64 tensor, got {got}")
    n, channels = images.shape[:2]
    if channels != 3:
        raise ValueError(f"color_matrix: expected images with 3 channels, got {channels}")
    if color_matrix.dim() != 3 or color_matrix.shape[1:] != (3, 4) or color_matrix.shape[0] not in (1, n):
        raise ValueError(f"color_matrix: expected shape (N, 3, 4) with N = {n} or 1, got {tuple(color_matrix.shape)}")
    _check_device(images, "color_matrix", color_matrix)
    if color_matrix.requires_grad and torch.is_grad_enabled():
        raise ValueError("color_matrix: the operation has no gradient for it; detach it")


def _check_device(images: torch.Tensor, name: str, tensor: torch.Tensor) -> None:
    if tensor.device != images.device:
        raise ValueError(f"{name}: expected the device of images, {images.device}, got {tensor.device}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _fake(
    images: torch.Tensor, matrix: torch.Tensor, size: Sequence[int], interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool, table: torch.Tensor | None, color_matrix: torch.Tensor | None,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None, memory_format: torch.memory_format,
) -> torch.Tensor:  # fmt: skip
    n, channels = images.shape[:2]
    return torch.empty(
        (n, channels, *size), dtype=dtype or images.dtype, device=images.device, memory_format=memory_format
    )


def _fake_backward(
    grad: torch.Tensor, images: torch.Tensor, matrix: torch.Tensor, interpolation: str, padding_mode: str,
    fill: Sequence[float], antialias: bool, color_matrix: torch.Tensor | None, std: Sequence[float],
    needs_images: bool, needs_matrix: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    grad_images = torch.empty_like(images) if needs_images else images.new_empty((0,))
    grad_matrix = matrix.new_empty(matrix.shape) if needs_matrix else matrix.new_empty((0,))
    return grad_images, grad_matrix


_op = registration.register(
    "affine_warp(Tensor images, Tensor matrix, SymInt[] size, str interpolation, str padding_mode, float[] fill, "
    "bool antialias, Tensor? table, Tensor? color_matrix, float[] mean, float[] std, ScalarType? dtype, "
    "MemoryFormat memory_format) -> Tensor",
    reference=reference.affine_warp,
    fallback="affine_warp:affine_warp",
    fake=_fake,
)
_backward_op = registration.register(
    "affine_warp_backward(Tensor grad, Tensor images, Tensor matrix, str interpolation, str padding_mode, "
    "float[] fill, bool antialias, Tensor? color_matrix, float[] std, bool needs_images, bool needs_matrix) "
    "-> (Tensor, Tensor)",
    reference=reference.affine_warp_backward,
    fallback="affine_warp:affine_warp_backward",
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    images, matrix, _, interpolation, padding_mode, fill, antialias, _, color_matrix, _, std, _, _ = inputs
    ctx.save_for_backward(images, matrix, color_matrix)
    ctx.arguments = (interpolation, padding_mode, fill, antialias)
    ctx.std = std


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    images, matrix, color_matrix = ctx.saved_tensors
    needs_images, needs_matrix = ctx.needs_input_grad[:2]
    grads: list[torch.Tensor | None] = [None] * 13
    if needs_images or needs_matrix:
        found = _backward_op(grad, images, matrix, *ctx.arguments, color_matrix, ctx.std, needs_images, needs_matrix)
        grads[0] = found[0] if needs_images else None
        grads[1] = found[1] if needs_matrix else None
    return tuple(grads)


def _no_second_gradient(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    raise RuntimeError("affine_warp: its gradient cannot be differentiated again; call backward without create_graph")


def _autocast(dtype: torch.dtype, images: torch.Tensor, matrix: torch.Tensor, *rest: Any) -> tuple[Any, ...]:
    if images.dtype in (torch.float16, torch.bfloat16, torch.float32):
        images = images.to(dtype)
    if matrix.dtype != torch.float64:
        matrix = matrix.float()
    return images, matrix, *rest


registration.register_autograd(_op, _backward, _setup_context)
registration.register_autograd(_backward_op, _no_second_gradient, lambda *_: None)
registration.register_autocast(_op, _autocast)
