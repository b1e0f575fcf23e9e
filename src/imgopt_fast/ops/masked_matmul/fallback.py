"""masked_matmul in Numba: the structure walked as the compiled kernels do, the samples in the inner loop.

Rows of x are transposed first, so that a value of the weight meets adjacent samples. Half precision is widened by
torch, because NumPy has no bfloat16.
"""

from collections.abc import Callable
from typing import Any, cast

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imgopt_fast._parallel import parallel_for
from imgopt_fast.ops.masked_matmul import reference
from imgopt_fast.ops.masked_matmul.int8 import requantize

Real = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def forward_quads(
    x: Real, values: Real, quads: Ints, columns: Ints, block: int, output: Real, first: int, last: int
) -> None:
    """output[row] += value * x[column] for quads first to last; x is (columns, samples), output (rows, samples)."""
    for b in range(quads.shape[0]):
        for q in range(first, last):
            i = 4 * quads[b, q, 4]
            at = quads[b, q, 5]
            for kind in range(3):
                distinct = 1 << kind
                for _ in range(quads[b, q, 6 + kind]):
                    for r in range(4):
                        row = quads[b, q, r]
                        if row < output.shape[0]:
                            column = b * block + columns[at + r * distinct // 4]
                            value = values[i]
                            for n in range(x.shape[1]):
                                output[row, n] += value * x[column, n]
                        i += 1
                    at += distinct


@_compiled
def weight_grad_quads(
    x: Real, grad: Real, quads: Ints, columns: Ints, source: Ints, block: int, output: Real, first: int, last: int
) -> None:
    """output[source] = sum over the samples of grad[row] * x[column] for quads first to last."""
    for b in range(quads.shape[0]):
        for q in range(first, last):
            i = 4 * quads[b, q, 4]
            at = quads[b, q, 5]
            for kind in range(3):
                distinct = 1 << kind
                for _ in range(quads[b, q, 6 + kind]):
                    for r in range(4):
                        if source[i] >= 0:
                            column = b * block + columns[at + r * distinct // 4]
                            total = x.dtype.type(0)
                            for n in range(x.shape[1]):
                                total += grad[quads[b, q, r], n] * x[column, n]
                            output[source[i]] = total
                        i += 1
                    at += distinct


def masked_matmul_packed(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    quads: Tensor,
    columns: Tensor,
    dense: Tensor | None,
    shape: list[int],
    window: list[int],
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    rows = reference.windows(input, window) if window else input
    dtype = reference.sum_dtype(input.dtype)
    x = _transposed(rows, dtype)
    output = np.zeros((shape[0], x.shape[1]), x.dtype)
    if bias is not None:
        output += bias.detach().to(dtype).numpy()[:, None]
    arrays = values.detach().to(dtype).contiguous().numpy(), quads.numpy(), columns.numpy()

    def body(first: int, last: int) -> None:
        forward_quads(x, *arrays, shape[2], output, first, last)

    _for_windows(quads, values, x.shape[1], body)
    if output_min is not None or output_max is not None:
        np.clip(output, output_min, output_max, out=output)
    result = torch.from_numpy(output).t().reshape(*rows.shape[:-1], shape[0]).to(input.dtype).contiguous()
    return result.permute(0, 3, 1, 2) if window else result


def masked_matmul(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quads: Tensor,
    columns: Tensor,
    source: Tensor,
    transposed_quads: Tensor,
    transposed_columns: Tensor,
    transposed_source: Tensor,
    shape: list[int],
    window: list[int],
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    values = reference.gather(weight, source)
    return masked_matmul_packed(input, values, bias, quads, columns, None, shape, window, output_min, output_max)


def masked_matmul_ordered(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    transposed_values: Tensor | None,
    quads: Tensor,
    columns: Tensor,
    source: Tensor,
    transposed_quads: Tensor,
    transposed_columns: Tensor,
    transposed_source: Tensor,
    shape: list[int],
    window: list[int],
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    return masked_matmul_packed(input, values, bias, quads, columns, None, shape, window, output_min, output_max)


def masked_matmul_weight_grad(
    input: Tensor,
    grad: Tensor,
    quads: Tensor,
    columns: Tensor,
    source: Tensor,
    transposed_quads: Tensor,
    transposed_columns: Tensor,
    transposed_source: Tensor,
    shape: list[int],
    window: list[int],
    weight_shape: list[int],
) -> Tensor:
    dtype = reference.sum_dtype(input.dtype)
    x = _transposed(reference.windows(input, window) if window else input, dtype)
    grad_rows = _transposed(grad.permute(0, 2, 3, 1) if window else grad, dtype)
    output = np.zeros(int(np.prod(weight_shape)), x.dtype)
    arrays = quads.numpy(), columns.numpy(), source.numpy()

    def body(first: int, last: int) -> None:
        weight_grad_quads(x, grad_rows, *arrays, shape[2], output, first, last)

    _for_windows(quads, source, x.shape[1], body)
    return torch.from_numpy(output).view(weight_shape).to(input.dtype)


def int8_masked_matmul(
    input: Tensor,
    values: Tensor,
    bias: Tensor,
    weight_scale: Tensor,
    weight_sum: Tensor,
    quads: Tensor,
    columns: Tensor,
    shape: list[int],
    input_scale: float,
    input_zero_point: int,
    output_scale: float | None,
    output_zero_point: int,
    output_dtype: torch.dtype,
    output_min: float | None,
    output_max: float | None,
) -> Tensor:
    """The sums in float64, which holds every int32 exactly: a product for each place in the groups."""
    group = shape[3]
    x = torch.nn.functional.pad(input.double() - input_zero_point, (0, -input.shape[-1] % group))
    sums = bias.double()
    for i in range(group):
        part = values[i::group].contiguous()
        sums = sums + masked_matmul_packed(
            x[..., i::group], part, None, quads, columns, None, shape[:3], [], None, None
        )  # fmt: skip
    scale = input_scale * weight_scale.double()
    return requantize(sums, scale, output_scale, output_zero_point, output_dtype, output_min, output_max)


def _transposed(rows: Tensor, dtype: torch.dtype) -> Real:
    """(columns, samples), contiguous."""
    samples = int(np.prod(rows.shape[:-1]))
    flat = rows.detach().reshape(samples, rows.shape[-1])
    return cast(Real, flat.to(dtype).t().contiguous().numpy())


def _for_windows(quads: Tensor, values: Tensor, samples: int, body: Callable[[int, int], object]) -> None:
    """Call `body(first quad, last quad)` on several threads, each with whole windows of rows.

    Within a window the rows of a quad differ from block to block, so two quads of it can write the same row.
    """
    per_window = reference.ROWS_PER_WINDOW // reference.ROWS_PER_QUAD
    count = quads.shape[1]
    windows = -(-count // per_window)
    worth_a_thread = 1 + windows * 1_000_000 // (1 + values.numel() * samples)
    parallel_for(windows, worth_a_thread, lambda i, j: body(i * per_window, min(count, j * per_window)))
