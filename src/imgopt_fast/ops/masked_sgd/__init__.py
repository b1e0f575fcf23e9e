"""One step of SGD over the kept weights of a masked layer: weight, velocity and mask in one pass, in place.

The weight and its gradient stay dense, as autograd has them; the mask comes as a bit per entry and the velocity holds
the kept entries only, so that at 90 % sparsity a step moves a quarter of the bytes that separate dense passes do.
csrc/masked_sgd/contract.h defines the arithmetic; every backend, instruction set and number of threads gives the same
bits.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imgopt_fast._arguments import described
from imgopt_fast.ops import registration
from imgopt_fast.ops.masked_sgd import reference

BLOCK = 4096  # MaskedSgd::kBlock of csrc/masked_sgd/contract.h


class Ordered(NamedTuple):
    """A copy of the kept weights in an order of masked_matmul, which a step writes besides the weight."""

    values: Tensor  # of the weight's dtype, as in a MaskLayout
    places: Tensor  # int32 (kept,): where in `values` each kept entry is


class KeptBits(NamedTuple):
    """Which entries of a flat weight exist: a bit each, and how many come before each block. Made by `kept_bits`."""

    bits: Tensor  # int64 (ceil(entries / 64),): bit i of word j is entry 64 j + i
    offsets: Tensor  # int64 (blocks + 1,): the last is the number kept
    entries: int
    kept: int


def kept_bits(mask: Tensor) -> KeptBits:
    """Pack a flat bool mask (entries,). Raises TypeError for anything else."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
        raise TypeError(f"mask: expected bool (entries,), got {described(mask, Tensor)}")
    flat = mask.detach().cpu().numpy()
    packed = np.packbits(flat, bitorder="little")
    words = np.zeros(-(-len(flat) // 64), dtype="<i8")
    words.view(np.uint8)[: len(packed)] = packed
    blocks = np.add.reduceat(flat, np.arange(0, len(flat), BLOCK), dtype=np.int64) if len(flat) else np.zeros(0)
    offsets = np.concatenate([[0], np.cumsum(blocks)]).astype(np.int64)
    bits = torch.from_numpy(words).to(mask.device)
    return KeptBits(bits, torch.from_numpy(offsets).to(mask.device), len(flat), int(offsets[-1]))


def masked_sgd(
    weight: Tensor,
    velocity: Tensor | None,
    grad: Tensor,
    kept: KeptBits,
    *,
    rate: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    first: bool = False,
    nesterov: bool = False,
    forward: Ordered | None = None,
    transposed: Ordered | None = None,
) -> None:
    """Change `weight` and `velocity` in place by one step; entries off the mask are neither read nor written.

    With g = grad + weight_decay * weight, v = momentum * v + (1 - dampening) * g (v = g where `first`), the weight
    loses rate * v, or rate * (g + momentum * v) with `nesterov`; without `velocity`, rate * g.

    Args:
        weight, grad: floating (entries,), contiguous; float32 on the CPU runs in the kernel, others in plain torch.
        velocity: (kept.kept,), the kept entries in their order, or None.
        kept: `kept_bits` of the mask.
        forward, transposed: orders in which a float32 weight is kept besides, so that masked_matmul need not gather it.

    Raises TypeError or ValueError, naming the argument, for anything else.
    """
    for name, tensor, size in (("weight", weight, kept.entries), ("grad", grad, kept.entries)):
        if tensor.dim() != 1 or len(tensor) != size or not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous ({size},), got {described(tensor, Tensor)}")
    if not weight.is_floating_point() or grad.dtype != weight.dtype:
        raise TypeError(f"grad: expected the weight's floating dtype {weight.dtype}, got {grad.dtype}")
    if velocity is not None and (velocity.shape != (kept.kept,) or velocity.dtype != weight.dtype):
        raise ValueError(f"velocity: expected {weight.dtype} ({kept.kept},), got {described(velocity, Tensor)}")
    for name, order in (("forward", forward), ("transposed", transposed)):
        if order is not None and (order.places.shape != (kept.kept,) or order.values.dtype != weight.dtype):
            raise ValueError(f"{name}: expected {weight.dtype} values and a place for each of {kept.kept} kept entries")
    fused = weight.dtype == torch.float32
    call = MASKED_SGD if fused else reference.masked_sgd
    with torch.no_grad():
        call(
            weight, velocity, grad, kept.bits, kept.offsets, rate, momentum, 1 - dampening, weight_decay, first,
            nesterov, *(forward or (None, None)), *(transposed or (None, None)),
        )  # fmt: skip
        if fused:  # what autograd saved of them is stale now
            torch.autograd.graph.increment_version(weight)


def _fake(*_: object) -> None:
    return None


MASKED_SGD = registration.register(
    "masked_sgd(Tensor(a!) weight, Tensor(b!)? velocity, Tensor grad, Tensor bits, Tensor offsets, float rate, "
    "float factor, float gain, float decay, bool first, bool nesterov, Tensor(c!)? values=None, Tensor? places=None, "
    "Tensor(d!)? transposed_values=None, Tensor? transposed_places=None) -> ()",
    reference=reference.masked_sgd,
    fallback="masked_sgd:masked_sgd",
    fake=_fake,
)
