"""The masked SGD step in plain torch, rounding where the kernels round: on any device and in any floating dtype."""

import torch
from torch import Tensor


def masked_sgd(
    weight: Tensor, velocity: Tensor | None, grad: Tensor, bits: Tensor, offsets: Tensor, rate: float, factor: float,
    gain: float, decay: float, first: bool, nesterov: bool, values: Tensor | None = None, places: Tensor | None = None,
    transposed_values: Tensor | None = None, transposed_places: Tensor | None = None,
) -> None:  # fmt: skip
    """The operation `imgopt_fast::masked_sgd`; csrc/masked_sgd/contract.h has the arithmetic."""
    at = kept_positions(bits)
    # As tensors of the weight's dtype: torch multiplies by a Python number in a wider type.
    rates, factors, gains, decays = (torch.full((), c, dtype=weight.dtype) for c in (rate, factor, gain, decay))
    old = weight[at]
    g = grad[at] + decays * old
    move = g
    if velocity is not None:
        move = g if first else factors * velocity + gains * g
        velocity.copy_(move)
        if nesterov:
            move = g + factors * move
    weight[at] = new = old - rates * move
    for ordered, where in ((values, places), (transposed_values, transposed_places)):
        if ordered is not None and where is not None:
            ordered[where.long()] = new


def kept_positions(bits: Tensor) -> Tensor:
    """int64 (kept,): the entries whose bit is set, ascending."""
    return ((bits[:, None] >> torch.arange(64, device=bits.device)) & 1).flatten().nonzero()[:, 0]
