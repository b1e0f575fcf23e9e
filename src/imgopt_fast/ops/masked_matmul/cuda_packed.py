"""Masks of 16 × 16 or 32 × 32 blocks, packed for inference on Hopper: csrc/masked_matmul/cuda_packed.h multiplies them.

A block of threads has up to 384 outputs and goes through x in stages of 64 columns; the blocks that a stage has lie in
a row, one copy each, in the order in which they are multiplied.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor

from imgopt_fast.ops import registration

Form = Literal["quads", "blocks", "packed 16", "packed 32", "2:4", "dense"]

BLOCK = 16  # side of the blocks of tensor cores
CLUSTER = 2  # blocks of threads that load x for each other
TILE_ROWS, DEPTH = 384, 64  # outputs of a block of threads, at most, and columns of x per stage
GROUPS = 3  # of warps, who share the rows of blocks
STAGE_BYTES = 16 << 10  # of a block of threads' weights; denser stages are split


def kept_blocks(mask: Tensor, side: int) -> Tensor | None:
    """Which square blocks a mask (O, K) keeps, bool (O / side, K / side), if it consists of such blocks."""
    if mask.dim() != 2 or 0 in mask.shape or mask.shape[0] % side or mask.shape[1] % side:
        return None
    tiles = mask.view(mask.shape[0] // side, side, mask.shape[1] // side, side).sum((1, 3))
    kept = tiles == side * side
    return kept if bool((kept | (tiles == 0)).all()) else None


def packed_form(mask: Tensor) -> Form | None:
    """The form of the larger blocks that the mask consists of; None where it does not consist of blocks."""
    if kept_blocks(mask, 2 * BLOCK) is not None:
        return "packed 32"
    return None if kept_blocks(mask, BLOCK) is None else "packed 16"


def has_packed_kernel(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.get_device_capability(weight.device) == (9, 0)


def _tile_rows(outputs: int, side: int) -> int:
    """Outputs of a block of threads: as many as all of them can have alike."""
    tiles = -(-outputs // (TILE_ROWS * CLUSTER)) * CLUSTER
    return -(-outputs // (tiles * side)) * side


def pack_blocks(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, stages, tiles) of csrc/masked_matmul/cuda_packed.h for a mask of 16 × 16 blocks, of 32 × 32 if it can.

    values (blocks, side, side): the blocks in the order in which they are multiplied, each as matrices of 8 × 8;
    stages int32 (stages, CLUSTER, 8): a word for each group of warps, whose bits tell the columns of each of its rows
    of blocks; how many blocks come before each group's, a byte each; first block, their number, first column of x;
    tiles int32: the first stage of each tile of outputs. Eager only.
    """
    outputs, inputs = mask.shape
    side = 2 * BLOCK if packed_form(mask) == "packed 32" else BLOCK
    device, rows, columns = weight.device, _tile_rows(outputs, side) // side, DEPTH // side
    row, column = mask[::side, ::side].nonzero(as_tuple=True)
    tile, local = row // rows, row % rows
    stages_across, tiles_across = -(-inputs // DEPTH), -(-outputs // (rows * side * CLUSTER))
    group = (tile // CLUSTER * stages_across + column // columns) * CLUSTER + tile % CLUSTER  # who loads it when
    order = torch.argsort((group * rows + local) * columns + column % columns)
    row, column, local, group = row[order], column[order], local[order], group[order]

    # A stage whose blocks are too many for one of the cluster is split for all of it.
    count = torch.bincount(group, minlength=tiles_across * stages_across * CLUSTER)
    place = torch.arange(len(group), device=device) - (count.cumsum(0) - count)[group]
    most = STAGE_BYTES // (2 * side * side)
    parts = -(-count.view(-1, CLUSTER).amax(1) // most)
    first_part = parts.cumsum(0) - parts
    stage = (first_part[group // CLUSTER] + place // most) * CLUSTER + group % CLUSTER
    order = torch.argsort(stage, stable=True)
    row, column, local, stage = row[order], column[order], local[order], stage[order]

    total, firsts = int(parts.sum()), torch.tensor([rows * g // GROUPS for g in range(GROUPS)], device=device)
    member = torch.bucketize(local, firsts[1:], right=True)
    bits = torch.zeros(total * CLUSTER, GROUPS, dtype=torch.int64, device=device)
    bits.view(-1).index_add_(0, stage * GROUPS + member, 1 << (local - firsts[member]) * columns + column % columns)
    members = torch.bincount(stage * GROUPS + member, minlength=total * CLUSTER * GROUPS).view(-1, GROUPS)
    before = ((members.cumsum(1) - members) << 8 * torch.arange(GROUPS, device=device)).sum(1, keepdim=True)
    bits = torch.where(bits >= 2**31, bits - 2**32, bits)
    number = torch.bincount(stage, minlength=total * CLUSTER)
    start = torch.arange(len(parts), device=device).repeat_interleave(parts) % stages_across * DEPTH
    first = number.cumsum(0) - number
    rest = torch.stack([first, number, start.repeat_interleave(CLUSTER), torch.zeros_like(first)], 1)
    stages = torch.cat([bits, before, rest], 1).view(total, CLUSTER, 8).to(torch.int32)
    tiles = torch.cat([first_part[::stages_across], parts.sum()[None]]).to(torch.int32)

    blocks = _as_blocks(weight.detach().contiguous(), side)[row, column]
    return blocks.unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3).reshape(-1, side, side), stages, tiles


def _as_blocks(weight: Tensor, side: int) -> Tensor:
    """(rows of blocks, columns of blocks, side, side), a view."""
    return weight.view(weight.shape[0] // side, side, weight.shape[1] // side, side).transpose(1, 2)


def unpack_blocks(values: Tensor, stages: Tensor, tiles: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, K), zero off the mask, that `pack_blocks` packed."""
    side, device = values.shape[2], values.device
    rows, columns = _tile_rows(outputs, side) // side, DEPTH // side
    bits = stages[:, :, :GROUPS, None] >> torch.arange(32, device=device, dtype=torch.int32) & 1
    stage, rank, member, bit = bits.nonzero(as_tuple=True)  # in the order of the blocks
    tile = torch.bucketize(stage, tiles[1:-1].to(stage.dtype), right=True) * CLUSTER + rank
    row = tile * rows + rows * member // GROUPS + bit // columns
    column = stages[stage, rank, 6] // side + bit % columns
    weight = values.new_zeros(outputs, inputs)
    blocks = values.reshape(-1, side // 8, side // 8, 8, 8).transpose(2, 3)
    _as_blocks(weight, side)[row, column] = blocks.reshape(-1, side, side)
    return weight


def _packed_reference(
    input: Tensor, values: Tensor, bias: Tensor | None, stages: Tensor, tiles: Tensor, outputs: int, tile_rows: int
) -> Tensor:
    kept = unpack_blocks(values, stages, tiles, outputs, input.shape[-1])
    output = torch.matmul(input.float(), kept.float().t())
    return (output if bias is None else output + bias.float()).to(input.dtype)


def _packed_fake(
    input: Tensor, values: Tensor, bias: Tensor | None, stages: Tensor, tiles: Tensor, outputs: int, tile_rows: int
) -> Tensor:
    return input.new_empty((*input.shape[:-1], outputs))


def cast_operands(
    dtype: torch.dtype, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """Under autocast."""
    return (input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *rest)


PACKED_BLOCK_MATMUL = registration.register(
    "packed_block_matmul(Tensor input, Tensor values, Tensor? bias, Tensor stages, Tensor tiles, int outputs, "
    "int tile_rows) -> Tensor",
    reference=_packed_reference,
    fallback=None,
    fake=_packed_fake,
)
registration.register_autocast(PACKED_BLOCK_MATMUL, cast_operands)


def packed_block_matmul(
    input: Tensor, values: Tensor, bias: Tensor | None, stages: Tensor, tiles: Tensor, outputs: int
) -> Tensor:
    """`input @ weight.T + bias` for the weight (outputs, K) that `pack_blocks` packed; no gradient passes."""
    rows = _tile_rows(outputs, values.shape[2])
    return cast(Tensor, PACKED_BLOCK_MATMUL(input, values, bias, stages, tiles, outputs, rows))
