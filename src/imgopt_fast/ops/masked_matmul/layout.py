"""From a mask to the structure that the kernels walk: MaskLayout (training) and PackedMaskedWeight (inference).

Every backend and every instruction set reads the same structure, "row quads". The columns are cut into blocks of
`block`, so that a block of transposed activations stays in the first-level cache; within a block and a window of 64
rows, the rows are sorted by their number of entries, and four neighbours form a quad. A quad is a list of steps, and
each step multiplies four values, one per row, with
    one activation column   (all four rows have it: blocks of 4×1, dense weights),
    two                     (rows 0 and 1 share one, rows 2 and 3 the other), or
    four                    (none shared),
in this order. The number of steps is the largest entry count of its rows; shorter rows are padded with zeros, which
the sorting makes rare. So one inner loop with sixteen independent sums and no branch serves everything from a dense
matrix to 99 % sparsity. Masks of row blocks, of squares and of N:M neighbours are recognised, and take the same steps:
a quad is a quarter of sixteen rows, or all of four.

    quads    int32 (blocks, ceil(rows / 4), 9): four rows, first step, first column, steps of each of the three kinds;
             rows from `rows` on are padding of the last quad
    columns  uint8, or int32 where a block has more than 256 columns: within the block, 1, 2 or 4 per step
    source   int32, 4 per step: flat position in the weight, -1 for padding
    values   4 per step: the weight at `source`, 0 for padding

A weight of a convolution (O, C / groups, kH, kW) has a column per tap and input channel, tap * C + c: what
channels_last activations have in memory. Groups are a block-diagonal mask.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast._arguments import described
from imgopt_fast._mask_blocks import (
    STRUCTURES,
    block_columns,
    dense_in_bfloat16,
    infers_sparse,
    keeps_dense_copy,
    structure_of,
)
from imgopt_fast.ops.masked_matmul import cuda, reference

MAX_COUNT = 2**31 - 1  # positions in the weight are int32


class MaskLayout(NamedTuple):
    """Where a mask is set, analysed for the kernels: the structure, and that of the transposed weight.

    Made by `mask_layout`; immutable, valid for one mask on one device.
    """

    mask: Tensor
    quads: Tensor
    columns: Tensor
    source: Tensor
    transposed_quads: Tensor
    transposed_columns: Tensor
    transposed_source: Tensor
    block: int
    transposed_block: int
    kept: int
    groups: int
    structure: int  # what the mask consists of, see structure_name
    dense_in_bfloat16: bool  # whether torch's dense product serves it in that dtype
    blocks: Tensor | None = None  # on CUDA, of a mask of 16 × 16 blocks: see cuda.block_bits
    transposed_blocks: Tensor | None = None
    values: Tensor | None = None  # see with_values
    transposed_values: Tensor | None = None

    def with_values(self, weight: Tensor, *, transposed: bool = True) -> "MaskLayout":
        """This layout with `weight` in the order in which the kernels visit it, which they then do not gather.

        For `weight` as it is now: masked_matmul reads these values in its place. An optimizer that writes them too,
        as MaskedSGD does, keeps them right. `transposed`: also in the order of the input gradient. On the CPU.
        """
        weight = weight.detach()
        backward = reference.gather(weight, self.transposed_source) if transposed else None
        return self._replace(values=reference.gather(weight, self.source), transposed_values=backward)

    @property
    def structure_name(self) -> str:
        """What the mask consists of: "16x16", "4x4", "16x1", "8x1" or "4x1" blocks, "1:4", "2:4", "dense" or "free"."""
        return STRUCTURES[self.structure]


class PackedMaskedWeight(NamedTuple):
    """The values of a masked weight in the order in which the kernel visits them. Made by `pack_masked_weight`.

    On CUDA, where `cuda.choose` says so, `values` is the weight itself with zeros, or torch's 2:4 form of it, and
    `quads` and `columns` are empty, or hold the bits of its blocks; on Hopper, `values` are the blocks alone
    (`cuda_packed.pack_blocks`). On the CPU so it is where torch's dense product is
    faster: in bfloat16 (`_mask_blocks.DENSE_BFLOAT16`), and of a convolution of few channels in float32
    (`_mask_blocks.SPARSE_CONVOLUTIONS`). `dense` is a copy for few samples
    (`_mask_blocks.DENSE_COPY`).
    """

    values: Tensor
    quads: Tensor
    columns: Tensor
    shape: tuple[int, ...]
    block: int
    kept: int
    groups: int
    structure: int = 0  # what the mask consists of, see structure_name
    dense: Tensor | None = None

    @property
    def structure_name(self) -> str:
        """As of a `MaskLayout`."""
        return STRUCTURES[self.structure]


def mask_layout(mask: Tensor, *, groups: int = 1) -> MaskLayout:
    """Analyse `mask` once, for use wherever a mask is accepted until it changes. Eager only.

    `mask` is bool, (O, K) of a linear or (O, C / groups, kH, kW) of a convolution with `groups` groups. Raises
    TypeError and ValueError for anything else.
    """
    mask = _checked_mask(mask, groups).detach().clone()
    kept = int(mask.sum())
    index = _gather_index(mask, groups)
    if mask.is_cuda and not cuda.may_need_quads(kept / max(1, mask.numel())):  # a hundredth of the time without them
        none = torch.empty(0, dtype=torch.int32, device=mask.device)
        block, forward = transposed_block, transposed = 0, (none, none, none)
    else:
        block, forward = _structure(mask, index)
        transposed_block, transposed = _structure(mask, index.permute(2, 1, 0))
    blocks, transposed_blocks = (cuda.block_bits(mask) if mask.is_cuda else None) or (None, None)
    return MaskLayout(
        mask,
        *forward,
        *transposed,
        block=block,
        transposed_block=transposed_block,
        kept=kept,
        groups=groups,
        structure=structure_of(_kept(mask, index).numpy()),
        dense_in_bfloat16=_dense_in_bfloat16(mask),
        blocks=blocks,
        transposed_blocks=transposed_blocks,
    )


def pack_masked_weight(weight: Tensor, mask: Tensor, *, groups: int = 1) -> PackedMaskedWeight:
    """Values and structure of `torch.where(mask, weight, 0)` for inference, instead of `weight` and `mask`. Eager only.

    `weight` is floating, (O, K) or (O, C / groups, kH, kW); `mask` bool of its shape. At 90 % sparsity the result
    takes about 15 % of the bytes of the float32 weight. A linear of more than about half its weights holds the dense
    weight too, for a few samples; a float32 convolution of fewer than 32 channels holds nothing else. Raises TypeError
    and ValueError for anything else.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight: expected a floating tensor, got {described(weight, Tensor)}")
    if weight.is_cuda and isinstance(mask, Tensor) and mask.shape == weight.shape and mask.device == weight.device:
        form = cuda.pack(weight.detach(), _checked_mask(mask, groups))
        if form is not None:
            return PackedMaskedWeight(*form, tuple(weight.shape), 0, int(mask.sum()), groups)
    _check_like(weight, mask, groups)
    kept = int(mask.sum())
    structure = structure_of(_kept(mask, _gather_index(mask, groups)).numpy())
    whole = torch.where(mask, weight.detach(), 0)
    if _is_dense(weight, mask, groups):
        if weight.dim() == 4:
            whole = whole.contiguous(memory_format=torch.channels_last)
        empty = torch.empty(0, dtype=torch.int32, device=weight.device)
        return PackedMaskedWeight(whole, empty, empty, tuple(weight.shape), 0, kept, groups, structure)
    values, quads, columns, block = pack_values(weight, mask, groups)
    copied = weight.dim() == 2 and keeps_dense_copy(kept / max(1, mask.numel()), _isa(mask))
    dense = whole.contiguous() if copied else None
    return PackedMaskedWeight(values, quads, columns, tuple(weight.shape), block, kept, groups, structure, dense)


def pack_values(
    weight: Tensor, mask: Tensor, groups: int, largest_block: int = MAX_COUNT
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(values, quads, columns, block) of a weight of any dtype."""
    _check_like(weight, mask, groups)
    block, (quads, columns, source) = _structure(mask, _gather_index(mask, groups), largest_block)
    return reference.gather(weight.detach(), source), quads, columns, block


def _check_like(weight: Tensor, mask: Tensor, groups: int) -> None:
    _checked_mask(mask, groups)
    if weight.shape != mask.shape:
        raise ValueError(f"mask: expected the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}")
    if weight.device != mask.device:
        raise ValueError(f"mask: expected the weight's device {weight.device}, got {mask.device}")


def _checked_mask(mask: Tensor, groups: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, got {described(mask, Tensor)}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"mask: expected (O, K) or (O, C / groups, kH, kW), got shape {tuple(mask.shape)}")
    if mask.numel() > MAX_COUNT:
        raise ValueError(f"mask: expected at most {MAX_COUNT} positions, got {mask.numel()}")
    if not isinstance(groups, int) or groups < 1 or mask.shape[0] % groups or (mask.dim() == 2 and groups != 1):
        raise ValueError(f"groups: expected a divisor of the {mask.shape[0]} outputs, 1 for (O, K), got {groups}")
    return mask


def _gather_index(mask: Tensor, groups: int) -> Tensor:
    """(O, taps, C): flat position in the weight of what output, tap and input channel multiply; -1 across groups."""
    out, per_group, *taps_yx = mask.shape
    taps = math.prod(taps_yx)
    index = torch.arange(mask.numel(), dtype=torch.int32).view(out, per_group, taps).transpose(1, 2)
    if groups == 1:
        return index
    full = torch.full((groups, out // groups, taps, groups, per_group), -1, dtype=torch.int32)
    for g in range(groups):
        full[g, :, :, g] = index.view(groups, out // groups, taps, per_group)[g]
    return full.view(out, taps, groups * per_group)


def _structure(
    mask: Tensor, index: Tensor, largest_block: int = MAX_COUNT
) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
    """(block, (quads, columns, source)) of the rows of `index`, of which those count that `mask` sets."""
    kept = _kept(mask, index)
    index = index.flatten(1)
    isa = _isa(mask)
    block = min(largest_block, block_columns(kept.numpy(), isa))
    core = _native.core() if _native.backend() == "native" else None
    build = reference.structure if core is None else core.mask_structure
    quads, columns, position = map(torch.from_numpy, build(kept.numpy(), block))
    source = torch.full_like(position, -1)
    real = position >= 0
    source[real] = index.flatten()[position[real]]
    return block, (quads.to(mask.device), columns.to(mask.device), source.to(mask.device))


def _kept(mask: Tensor, index: Tensor) -> Tensor:
    """(rows, columns) bool on the CPU: which entries of `index` exist and are set."""
    index = index.flatten(1).contiguous()
    flat = mask.cpu().flatten()
    return (flat[index.clamp(min=0)] & (index >= 0)) if flat.numel() else torch.zeros(index.shape, dtype=torch.bool)


def _isa(mask: Tensor) -> str | None:
    return "cuda" if mask.is_cuda else _native.active_isa()


def _is_dense(weight: Tensor, mask: Tensor, groups: int) -> bool:
    """Whether torch's dense product serves the weight at inference."""
    if weight.dtype == torch.bfloat16:
        return _dense_in_bfloat16(mask)
    if weight.dim() != 4 or weight.dtype != torch.float32 or mask.is_cuda or mask.numel() == 0:
        return False
    channels = min(mask.shape[0] // groups, mask.shape[1])
    return not infers_sparse(channels, int(mask.sum()) / mask.numel(), _isa(mask))


def _dense_in_bfloat16(mask: Tensor) -> bool:
    if mask.dim() != 2 or mask.is_cuda or not torch.cpu._is_avx512_bf16_supported():
        return False
    return dense_in_bfloat16(int(mask.sum()) / max(1, mask.numel()), _isa(mask))
