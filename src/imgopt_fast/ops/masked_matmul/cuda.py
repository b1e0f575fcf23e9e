"""Which kernel serves a masked product on CUDA, and the one that only CUDA has: 16 × 16 blocks on tensor cores.

A GPU's dense product runs on units that a sparse one cannot use, so most masks are served by the dense product of
`where(mask, weight, 0)`. The table says where not, from an H100 and 4096 × 4096 weights with 4096 samples
(benchmarks/results/nvidia-h100.md; benchmarks/cuda_check.py measures every form). The choice depends on count and
dtype alone.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor

from imgopt_fast.ops import registration
from imgopt_fast.ops.masked_matmul.cuda_packed import (
    BLOCK,
    Form,
    cast_operands,
    has_packed_kernel,
    kept_blocks,
    pack_blocks,
    packed_block_matmul,
    packed_form,
)

COLUMNS = 128  # per block of row quads: with 64 samples a tile of 32 KB, two of them and their sums in an SM
# Greatest density that the form serves: where it overtakes the dense product. Blocks in place, with the weight of the
# training, do so between 90 and 95 % sparsity; packed for inference on Hopper, between 70 and 80 % (16 × 16) or 60 and
# 70 % (32 × 32). Row quads do so between 95 and 99 % (1.37 of its speed) in float32, but how long their gradients take
# is not known: they serve who calls them by their structure.
LARGEST_DENSITY = {
    (form, dtype): density
    for dtype in (torch.float16, torch.bfloat16)
    for form, density in (("blocks", 0.05), ("packed 16", 0.2), ("packed 32", 0.3))
}


def form_in_training(input: Tensor, count: int, kept: int, *, blocks: bool) -> Form:
    """The form that serves a layer with `count` weights, of which `kept` exist, for this input, autocast included."""
    lowered = torch.is_autocast_enabled("cuda") and input.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cuda") if lowered else input.dtype
    return choose(dtype, kept / max(1, count), blocks=blocks)


def choose(
    dtype: torch.dtype, density: float, *, blocks: bool, packed: Form | None = None, two_of_four: bool = False
) -> Form:
    """The form of a mask of `density`; `blocks`: it consists of 16 × 16 blocks, `two_of_four`: at most 2 of 4.

    `packed`: how its blocks could be packed, if they could.
    """
    if packed and density <= LARGEST_DENSITY.get((packed, dtype), -1.0):
        return packed
    if blocks and density <= LARGEST_DENSITY.get(("blocks", dtype), -1.0):
        return "blocks"
    if density <= LARGEST_DENSITY.get(("quads", dtype), -1.0):
        return "quads"
    if two_of_four and dtype in (torch.float16, torch.bfloat16):
        return "2:4"
    return "dense"


def may_need_quads(density: float) -> bool:
    """Whether row quads serve a mask of `density` in some dtype."""
    return any(form == "quads" and density <= most for (form, _), most in LARGEST_DENSITY.items())


def block_bits(mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Bits of the 16 × 16 blocks that a mask (O, K) consists of, and those of its transpose; None if it does not.

    int32 (O / 16, ceil(K / 16 / 32)), the first block in the lowest bit. Reads the mask's values: eager only.
    """
    kept = kept_blocks(mask, BLOCK)
    return None if kept is None else (_bits(kept), _bits(kept.t()))


def _bits(kept: Tensor) -> Tensor:
    rows, columns = kept.shape
    padded = torch.nn.functional.pad(kept.to(torch.int64), (0, -columns % 32)).view(rows, -1, 32)
    words = (padded << torch.arange(32, device=kept.device)).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def is_two_of_four(mask: Tensor) -> bool:
    """Whether every four neighbours of a row keep at most two, and the sizes suit the sparse tensor cores."""
    if mask.dim() != 2 or mask.shape[0] % 64 or mask.shape[1] % 64 or 0 in mask.shape:
        return False
    return bool((mask.view(mask.shape[0], -1, 4).sum(2) <= 2).all())


def pack(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """(values, quads, columns) of a PackedMaskedWeight that is not made of row quads; None for those. Eager only."""
    density = int(mask.sum()) / max(1, mask.numel())
    bits = block_bits(mask)
    packed = packed_form(mask) if has_packed_kernel(weight) else None
    form = choose(weight.dtype, density, blocks=bits is not None, packed=packed, two_of_four=is_two_of_four(mask))
    if form == "quads":
        return None
    if form in ("packed 16", "packed 32"):
        return pack_blocks(weight, mask)
    kept = torch.where(mask, weight, 0)
    if form == "blocks":
        assert bits is not None
        return kept, *bits
    empty = torch.empty(0, dtype=torch.int32, device=weight.device)
    if form == "2:4":
        with warnings.catch_warnings():  # torch announces the interface as a prototype
            warnings.simplefilter("ignore", UserWarning)
            kept = torch.sparse.to_sparse_semi_structured(kept)
    return kept, empty, empty


def linear_of_packed(
    input: Tensor, values: Tensor, bias: Tensor | None, quads: Tensor, columns: Tensor, outputs: int
) -> Tensor:
    """The product with what `pack` made."""
    if values.dim() == 3:
        return packed_block_matmul(input, values, bias, quads, columns, outputs)
    if quads.dim() == 2:
        return block_matmul(input, values, bias, quads, columns)
    return torch.nn.functional.linear(input, values, bias)


# --- the operation --------------------------------------------------------------------------------------------------


def _expanded(blocks: Tensor, columns: int) -> Tensor:
    bits = (blocks[:, :, None] >> torch.arange(32, device=blocks.device, dtype=torch.int32)) & 1
    kept = bits.flatten(1)[:, : columns // BLOCK].bool()
    return kept.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def _reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, transposed_blocks: Tensor, transposed: bool
) -> Tensor:
    rows = weight.t() if transposed else weight
    kept = torch.where(_expanded(blocks, rows.shape[1]), rows, 0)
    output = torch.matmul(input.float(), kept.float().t())
    return (output if bias is None else output + bias.float()).to(input.dtype)


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[1 if rest[-1] else 0]))


BLOCK_MATMUL = registration.register(
    "block_matmul(Tensor input, Tensor weight, Tensor? bias, Tensor blocks, Tensor transposed_blocks, bool transposed) "
    "-> Tensor",
    reference=_reference,
    fallback=None,
    fake=_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, blocks, transposed_blocks, transposed = inputs
    ctx.save_for_backward(input, weight, blocks, transposed_blocks)
    ctx.transposed, ctx.has_bias = transposed, bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The weight's gradient is a dense product, masked: its blocks are too few to fill a kernel of their own."""
    input, weight, blocks, transposed_blocks = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_input = grad_weight = grad_bias = None
    if needs_input:
        grad_input = BLOCK_MATMUL(grad, weight, None, transposed_blocks, blocks, not ctx.transposed)
    if needs_weight:
        rows, columns = input.flatten(0, -2), grad.flatten(0, -2)
        dense = rows.t() @ columns if ctx.transposed else columns.t() @ rows
        kept = _expanded(transposed_blocks if ctx.transposed else blocks, weight.shape[1])
        grad_weight = torch.where(kept, dense, 0)
    if needs_bias and ctx.has_bias:
        grad_bias = grad.flatten(0, -2).sum(0)
    return grad_input, grad_weight, grad_bias, None, None, None


torch.library.register_autograd(BLOCK_MATMUL, _backward, setup_context=_setup, lib=registration.LIBRARY)


registration.register_autocast(BLOCK_MATMUL, cast_operands)


def block_matmul(
    input: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, transposed_blocks: Tensor
) -> Tensor:
    """`input @ where(mask, weight, 0).T + bias` for a mask of 16 × 16 blocks, whose bits `block_bits` made."""
    return cast(Tensor, BLOCK_MATMUL(input, weight, bias, blocks, transposed_blocks, False))
