"""The masked SGD step in Numba, a bit at a time: what serves where no compiler was found."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from imgopt_fast._parallel import parallel_for
from imgopt_fast.ops.masked_sgd.reference import kept_positions

Real = NDArray[np.float32]
Ints = NDArray[np.int64]
_BLOCK = 4096
_WORTH_THREAD = 16  # blocks: some 20 us of a core
_compiled = numba.njit(nogil=True, cache=True)


@_compiled
def _step_blocks(
    weight: Real, velocity: Real, grad: Real, bits: Ints, offsets: Ints, factors: Real, moves: bool, first: bool,
    nesterov: bool, begin: int, end: int,
) -> None:  # fmt: skip
    rate, factor, gain, decay = factors[0], factors[1], factors[2], factors[3]
    for block in range(begin, end):
        at = offsets[block]
        for i in range(block * _BLOCK, min(len(weight), (block + 1) * _BLOCK)):
            if (bits[i >> 6] >> (i & 63)) & 1:
                g = grad[i] + decay * weight[i]
                move = g
                if moves:
                    if not first:
                        move = factor * velocity[at] + gain * g
                    velocity[at] = move
                    if nesterov:
                        move = g + factor * move
                weight[i] -= rate * move
                at += 1


def masked_sgd(
    weight: Tensor, velocity: Tensor | None, grad: Tensor, bits: Tensor, offsets: Tensor, rate: float, factor: float,
    gain: float, decay: float, first: bool, nesterov: bool, values: Tensor | None = None, places: Tensor | None = None,
    transposed_values: Tensor | None = None, transposed_places: Tensor | None = None,
) -> None:  # fmt: skip
    """The operation `imgopt_fast::masked_sgd` on the CPU."""
    factors = np.array([rate, factor, gain, decay], dtype=np.float32)
    moved = np.zeros(0, dtype=np.float32) if velocity is None else velocity.numpy()
    step: Any = _step_blocks
    arrays = (weight.detach().numpy(), moved, grad.numpy(), bits.numpy(), offsets.numpy(), factors)
    parallel_for(
        len(offsets) - 1,
        _WORTH_THREAD,
        lambda begin, end: step(*arrays, velocity is not None, first, nesterov, begin, end),
    )
    for ordered, where in ((values, places), (transposed_values, transposed_places)):
        if ordered is not None and where is not None:
            ordered[where.long()] = weight.detach()[kept_positions(bits)]
