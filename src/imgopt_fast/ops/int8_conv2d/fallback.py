"""The Numba twin of int8_conv2d, for machines without the compiled kernels: the same sums and the same rounding.

A serial kernel over a range of output rows that releases the GIL; `parallel_for` spreads the rows over threads. The
weights are brought into (out, kernel_h, kernel_w, group_channels) order, so that LLVM vectorises the innermost loop.
"""

import math

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgopt_fast import _parallel
from imgopt_fast.ops.int8_conv2d import reference

GRAIN_PRODUCTS = 1 << 18  # multiply-adds that are worth a thread


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_scale: Tensor,
    packed: Tensor,
    residual: Tensor | None,
    input_scale: float,
    input_zero_point: int,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    output_min: float | None,
    output_max: float | None,
    residual_scale: float,
    residual_zero_point: int,
    shift: bool,
) -> Tensor:
    """Implements the schema of `int8_conv2d` on the CPU; `packed` is not looked at."""
    sums = convolve(input, weight, bias, input_zero_point, stride, padding, dilation, groups)
    return reference.requantize(
        sums, input_scale * weight_scale.double(), residual, output_scale, output_zero_point, output_dtype, output_min,
        output_max, residual_scale, residual_zero_point, shift,
    )  # fmt: skip


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """The exact sums with bias, int32 (N, O, OH, OW) in channels_last memory."""
    top, bottom, left, right = padding
    kernel_h, kernel_w = weight.shape[2:]
    height = (input.shape[2] + top + bottom - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (input.shape[3] + left + right - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    x = input.permute(0, 2, 3, 1).contiguous().numpy()
    w = weight.permute(0, 2, 3, 1).contiguous().numpy()
    sums = np.empty((input.shape[0], height, width, weight.shape[0]), np.int32)
    products = math.prod(weight.shape[1:]) * weight.shape[0] * width

    window = (stride[0], stride[1], top, left, dilation[0], dilation[1])

    def rows(begin: int, end: int) -> None:
        _rows(x, w, bias.numpy(), zero_point, window, groups, sums, begin, end)

    _parallel.parallel_for(input.shape[0] * height, GRAIN_PRODUCTS // (products + 1) + 1, rows)
    return torch.from_numpy(sums).permute(0, 3, 1, 2)


@numba.njit(nogil=True, cache=True)
def _rows(
    x: NDArray[np.uint8],
    w: NDArray[np.int8],
    bias: NDArray[np.int32],
    zero_point: int,
    window: tuple[int, int, int, int, int, int],
    groups: int,
    sums: NDArray[np.int32],
    begin: int,
    end: int,
) -> None:
    stride_h, stride_w, top, left, dilation_h, dilation_w = window
    in_h, in_w = x.shape[1:3]
    outputs, kernel_h, kernel_w, channels = w.shape
    out_h, out_w = sums.shape[1:3]
    for row in range(begin, end):
        n, oy = row // out_h, row % out_h
        for ox in range(out_w):
            for o in range(outputs):
                first = o // (outputs // groups) * channels
                total = np.int32(bias[o])
                for ky in range(kernel_h):
                    y = oy * stride_h - top + ky * dilation_h
                    if y < 0 or y >= in_h:
                        continue
                    for kx in range(kernel_w):
                        column = ox * stride_w - left + kx * dilation_w
                        if column < 0 or column >= in_w:
                            continue
                        part = np.int32(0)
                        for c in range(channels):
                            # Numba widens sums to 64 bits; the casts let LLVM multiply in 32.
                            difference = np.int32(np.int32(x[n, y, column, first + c]) - np.int32(zero_point))
                            part = np.int32(part + np.int32(np.int32(w[o, ky, kx, c]) * difference))
                        total = np.int32(total + part)
                sums[n, oy, ox, o] = total
