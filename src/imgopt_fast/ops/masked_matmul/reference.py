"""masked_matmul in plain torch, on any device: decode the structure into a dense weight, then one matmul.

Half-precision inputs are multiplied and summed in float32 and rounded once, as the kernels do.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS_PER_QUAD = 4
FEWEST_STEPS = 4  # a loop of fewer costs more in a mispredicted branch than it saves in loads
ROWS_PER_WINDOW = 64  # rows that are sorted together; also the rows of a kernel's unit of work


def structure(mask: NDArray[np.bool_], block: int) -> tuple[NDArray[np.int32], NDArray[np.generic], NDArray[np.int32]]:
    """(quads, columns, position) of a mask (rows, columns), as layout.py describes; position is row * columns + column.

    The oracle of the compiled builder, which must agree with it exactly.
    """
    rows, columns = mask.shape
    blocks, quads = -(-columns // block), -(-rows // ROWS_PER_QUAD)
    padded = np.zeros((quads * ROWS_PER_QUAD, blocks * block), np.bool_)
    padded[:rows, :columns] = mask
    by_block = padded.reshape(quads * ROWS_PER_QUAD, blocks, block).transpose(1, 0, 2)

    order = _sorted_rows(by_block.sum(-1))
    taken = np.take_along_axis(by_block, order[:, :, None], 1).reshape(blocks, quads, ROWS_PER_QUAD, block)
    all_four: NDArray[np.bool_] = np.asarray(taken.all(2))
    all_four &= all_four.sum(-1, keepdims=True) >= FEWEST_STEPS
    pair = taken.reshape(blocks, quads, 2, 2, block).all(3) & ~all_four[:, :, None]
    pairs = pair.sum(-1).min(-1)
    pairs[pairs < FEWEST_STEPS] = 0
    pair &= pair.cumsum(-1) <= pairs[:, :, None, None]
    single = taken & ~all_four[:, :, None] & ~pair.repeat(2, axis=2)
    counts = np.stack([all_four.sum(-1), pairs, single.sum(-1).max(-1)], -1)

    first_step = _starts(counts.sum(-1))
    first_column = _starts(counts @ np.array([1, 2, 4]))
    table = np.concatenate(
        [order.reshape(blocks, quads, 4), first_step[:-1].reshape(blocks, quads, 1),
         first_column[:-1].reshape(blocks, quads, 1), counts], -1
    ).astype(np.int32)  # fmt: skip
    local = np.zeros(first_column[-1], np.uint8 if block <= 256 else np.int32)
    position = np.full((first_step[-1], ROWS_PER_QUAD), -1, np.int32)
    step, column = table[..., 4], table[..., 5]
    four, two = counts[..., 0], counts[..., 1]

    def place(at: tuple[NDArray[np.intp], ...], step: NDArray[np.intp], lane: NDArray[np.intp] | int) -> None:
        b, q, k = at[0], at[1], at[-1]
        position[step, lane] = order.reshape(blocks, quads, 4)[b, q, lane] * columns + b * block + k

    at = all_four.nonzero()
    rank = _ranks(all_four)
    local[column[at[:2]] + rank] = at[2]
    for lane in range(ROWS_PER_QUAD):
        place(at, step[at[:2]] + rank, lane)

    at = pair.nonzero()
    rank, where = _ranks(pair), at[:2]
    local[column[where] + four[where] + 2 * rank + at[2]] = at[3]
    for half in range(2):
        place(at, step[where] + four[where] + rank, 2 * at[2] + half)

    at = single.nonzero()
    rank, where = _ranks(single), at[:2]
    local[column[where] + four[where] + 2 * two[where] + 4 * rank + at[2]] = at[3]
    place(at, step[where] + four[where] + two[where] + rank, at[2])
    return table, local, position.reshape(-1)


def _sorted_rows(counts: NDArray[np.intp]) -> NDArray[np.intp]:
    """(blocks, rows): the rows of each window by falling count, stable."""
    rows = np.arange(counts.shape[1])
    return np.array([np.lexsort((-c, rows // ROWS_PER_WINDOW)) for c in counts], np.intp).reshape(counts.shape)


def _starts(sizes: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.concatenate([[0], sizes.reshape(-1).cumsum()])


def _ranks(chosen: NDArray[np.bool_]) -> NDArray[np.intp]:
    """How many earlier columns of its row each chosen one has."""
    return (chosen.cumsum(-1) - 1)[chosen]


def gather(weight: Tensor, source: Tensor) -> Tensor:
    """Values in visiting order: weight at `source`, 0 where it is -1."""
    if weight.numel() == 0:
        return weight.new_zeros(source.shape)
    values = weight.reshape(-1)[source.clamp(min=0).long()]
    return torch.where(source >= 0, values, torch.zeros((), dtype=weight.dtype, device=weight.device))


def entries(quads: Tensor, columns: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(row, column) of every value of a structure, in visiting order: each (4 * steps,)."""
    per_block = quads.shape[1]
    flat = quads.reshape(-1, 9).long()
    four, two, one = flat[:, 6], flat[:, 7], flat[:, 8]
    steps = four + two + one
    owner = torch.repeat_interleave(torch.arange(flat.shape[0], device=flat.device), steps)
    rank = torch.arange(owner.numel(), device=flat.device) - flat[owner, 4]
    four, two, first = four[owner], two[owner], flat[owner, 5]
    lane = torch.arange(ROWS_PER_QUAD, device=flat.device)
    in_four = (first + rank)[:, None].expand(-1, 4)
    in_two = (first + four + 2 * (rank - four))[:, None] + lane // 2
    in_one = (first + four + 2 * two + 4 * (rank - four - two))[:, None] + lane
    at = torch.where((rank < four)[:, None], in_four, torch.where((rank < four + two)[:, None], in_two, in_one))
    column = columns.long()[at] + (owner // max(1, per_block) * block)[:, None]
    return flat[owner, :4].reshape(-1), column.reshape(-1)


def windows(input: Tensor, window: list[int]) -> Tensor:
    """(N, outH, outW, taps * C): what each output position of a convolution sees, zero outside of the input.

    `window` is (outH, outW, kH, kW, and then y, x of: step, offset, tap, divide): tap t of output o reads the input at
    (o * step + offset + t * tap) / divide, where that is whole. A convolution has step = stride, offset = -padding,
    tap = dilation, divide = 1; its input gradient is the same with the roles of input and output exchanged.
    """
    out_h, out_w, taps_h, taps_w, *rest = window
    padded = torch.nn.functional.pad(input, (0, 1, 0, 1))  # the last row and column stand for everything outside
    pieces = []
    for ty in range(taps_h):
        y = _positions(out_h, ty, input.shape[2], rest[0::2], input.device)
        for tx in range(taps_w):
            x = _positions(out_w, tx, input.shape[3], rest[1::2], input.device)
            pieces.append(padded[:, :, y][:, :, :, x])
    return torch.stack(pieces, -1).permute(0, 2, 3, 4, 1).flatten(3)


def _positions(count: int, tap: int, size: int, line: list[int], device: torch.device) -> Tensor:
    step, offset, per_tap, divide = line
    at = torch.arange(count, device=device) * step + (offset + tap * per_tap)
    inside = (at % divide == 0) & (at >= 0) & (at < size * divide)
    return torch.where(inside, torch.div(at, divide, rounding_mode="floor"), size)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dense_weight(values: Tensor, quads: Tensor, columns: Tensor, rows: int, width: int, block: int) -> Tensor:
    """(rows, width): the weight that a structure with these values stands for."""
    row, column = entries(quads, columns, block)
    dense = values.new_zeros(quads.shape[1] * ROWS_PER_QUAD, quads.shape[0] * block)
    dense.index_put_((row, column), values, accumulate=True)  # padding adds zero to a column that exists
    return dense[:rows, :width]


def masked_matmul_packed(
    input: Tensor, values: Tensor, bias: Tensor | None, quads: Tensor, columns: Tensor, copy: Tensor | None,
    shape: list[int], window: list[int], output_min: float | None, output_max: float | None,
) -> Tensor:  # fmt: skip
    out_features, in_features, block = shape[:3]
    rows = windows(input, window) if window else input
    width = in_features * (window[2] * window[3] if window else 1)
    dtype = sum_dtype(input.dtype)
    dense = dense_weight(values.to(dtype), quads, columns, out_features, width, block)
    output = torch.matmul(rows.to(dtype), dense.t())
    if bias is not None:
        output = output + bias.to(dtype)
    if output_min is not None or output_max is not None:
        output = output.clamp(output_min, output_max)
    output = output.to(input.dtype)
    return output.permute(0, 3, 1, 2) if window else output


def masked_matmul(
    input: Tensor, weight: Tensor, bias: Tensor | None, quads: Tensor, columns: Tensor, source: Tensor,
    transposed_quads: Tensor, transposed_columns: Tensor, transposed_source: Tensor, shape: list[int],
    window: list[int], output_min: float | None, output_max: float | None,
) -> Tensor:  # fmt: skip
    values = gather(weight, source)
    return masked_matmul_packed(input, values, bias, quads, columns, None, shape, window, output_min, output_max)


def masked_matmul_ordered(
    input: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, transposed_values: Tensor | None, quads: Tensor,
    columns: Tensor, source: Tensor, transposed_quads: Tensor, transposed_columns: Tensor, transposed_source: Tensor,
    shape: list[int], window: list[int], output_min: float | None, output_max: float | None,
) -> Tensor:  # fmt: skip
    return masked_matmul_packed(input, values, bias, quads, columns, None, shape, window, output_min, output_max)


def masked_matmul_weight_grad(
    input: Tensor, grad: Tensor, quads: Tensor, columns: Tensor, source: Tensor, transposed_quads: Tensor,
    transposed_columns: Tensor, transposed_source: Tensor, shape: list[int], window: list[int],
    weight_shape: list[int],
) -> Tensor:  # fmt: skip
    dtype = sum_dtype(input.dtype)
    rows = (windows(input, window) if window else input).to(dtype)
    grad_rows = (grad.permute(0, 2, 3, 1) if window else grad).to(dtype)
    samples = math.prod(rows.shape[:-1])
    rows, grad_rows = rows.reshape(samples, rows.shape[-1]), grad_rows.reshape(samples, grad_rows.shape[-1])
    dense = torch.matmul(grad_rows.t(), rows).to(input.dtype)
    row, column = entries(quads, columns, shape[2])
    real = source >= 0
    result = input.new_zeros(weight_shape)
    result.view(-1)[source[real].long()] = dense[row[real], column[real]]
    return result
