"""From what weights are worth to masks: single weights, blocks that stand or fall together, N of M neighbours.

Blocks and neighbours are those of the matrix that a kernel sees: a row per output, the columns of a convolution being
its taps with all their input channels side by side, as channels_last activations lie in memory.
"""

import numpy as np
import torch
from torch import Tensor, nn

from imgopt_fast.compress.prune.config import parse_structure


def block_scores(score: Tensor, structure: str) -> Tensor:
    """(rows / R, columns / C): the sum over each block of a score of the weight's shape."""
    rows, columns = _block_shape(structure)
    matrix = _as_matrix(score)
    out, inputs = matrix.shape
    padded = nn.functional.pad(matrix, (0, -inputs % columns, 0, -out % rows))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).sum((1, 3))


def spread(kept: Tensor, structure: str, shape: torch.Size) -> Tensor:
    """The mask of a weight of `shape` from one entry per block."""
    rows, columns = _block_shape(structure)
    mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    if len(shape) == 2:
        return mask[: shape[0], : shape[1]]
    out, inputs, height, width = shape
    mask = mask[:out, : inputs * height * width]
    return mask.reshape(out, height, width, inputs).permute(0, 3, 1, 2)


def keep_best(score: Tensor, sparsity: float) -> Tensor:
    """bool: all but the round(sparsity * n) smallest of a flat score; of equals the earlier ones are kept."""
    return keep_count(score, score.numel() - round(sparsity * score.numel()))


def keep_count(score: Tensor, count: int) -> Tensor:
    """bool: the `count` largest of a flat score; of equals the earlier ones.

    From the smallest that is kept, which NumPy finds in a hundredth of the time that torch needs to sort.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    smallest = float(np.partition(score.cpu().numpy(), score.numel() - count)[score.numel() - count])
    mask = score > smallest
    equals = (score == smallest).nonzero()[:, 0]
    mask[equals[: count - int(mask.sum())]] = True
    return mask


def keep_n_of_m(score: Tensor, structure: str) -> Tensor:
    """bool: the N largest of every M neighbours in a row of a score (rows, columns)."""
    n, m = parse_structure(structure)
    padded = nn.functional.pad(score, (0, -score.shape[1] % m), value=-2).unflatten(1, (-1, m))
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(n, 2).indices, True)
    return kept.flatten(1)[:, : score.shape[1]]


def layer_mask(score: Tensor, structure: str, sparsity: float) -> Tensor:
    """The mask that keeps what a score of the weight's shape ranks highest."""
    if ":" in structure:
        return spread(keep_n_of_m(block_scores(score, structure), structure), structure, score.shape)
    blocks = block_scores(score, structure)
    return spread(keep_best(blocks.flatten(), sparsity).view(blocks.shape), structure, score.shape)


def random_mask(shape: torch.Size, structure: str, density: float, generator: torch.Generator) -> Tensor:
    """A mask of `structure` with a share `density` of its blocks kept, those uniformly at random; N:M rounds N."""
    score = torch.rand(shape, generator=generator)
    if ":" in structure:
        size = parse_structure(structure)[1]
        structure = f"{max(1, round(density * size))}:{size}"
    return layer_mask(score, structure, 1 - density)


def _block_shape(structure: str) -> tuple[int, int]:
    return (1, 1) if ":" in structure else parse_structure(structure)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
