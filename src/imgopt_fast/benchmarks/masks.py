"""The masks of the benchmarks of sparse products, and how well their float32 results agree."""

import torch

from imgopt_fast.benchmarks.case import Agreement

# Sums of a thousand float32 products in different orders, against the largest of them.
FLOAT32 = Agreement(1e-5, relative=True)


def random_mask(outputs: int, inputs: int, sparsity: float, block: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """Boolean (outputs, inputs), a share `sparsity` of its blocks is False, uniformly at random."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = outputs // block[0], inputs // block[1]
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return kept.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)


def neighbours_mask(outputs: int, inputs: int, kept: int) -> torch.Tensor:
    """Boolean (outputs, inputs), `kept` of every four neighbours of a row are True, uniformly at random."""
    order = torch.rand(outputs, inputs // 4, 4, generator=torch.Generator().manual_seed(5)).argsort(2)
    mask = torch.zeros(order.shape, dtype=torch.bool)
    return mask.scatter_(2, order[..., :kept], True).flatten(1)
