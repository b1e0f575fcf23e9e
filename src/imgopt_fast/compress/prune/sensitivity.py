"""Which layers bear pruning: one layer at a time is pruned to each sparsity, and the network is judged."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.compress.prune.apply import prunable_layers
from imgopt_fast.compress.prune.config import PruneConfig, parse_structure
from imgopt_fast.compress.prune.structure import layer_mask


class PruningSensitivity(NamedTuple):
    """The judgement of the network with this one layer pruned; `change` is against the network as it was given."""

    layer: str
    sparsity: float
    score: float
    change: float


@torch.no_grad()
def pruning_sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
    config: PruneConfig | None = None,
) -> list[PruningSensitivity]:
    """Prune each layer by itself, in one shot and without training, and judge the network.

    Args:
        model: is left as it was; masks that it has stay.
        evaluate: what the network is worth, e.g. accuracy or loss on a few validation batches. It is called with
            `model` itself, in evaluation mode, once as it is and then once per layer and sparsity.
        sparsities: shares of the layer's weights to remove; a structure "N:M" has but its own.
        config: method, structure, exclude and seed; the rest of it is unused. Not for structure "channels".

    Returns a row per layer and sparsity, layers in the model's order. Raises ValueError for structure "channels".
    """
    config = config or PruneConfig()
    if config.channels:
        raise ValueError("structure: expected one of masks, got 'channels'")
    if config.n_of_m:
        n, m = parse_structure(config.structure)
        sparsities = (1 - n / m,)
    generator = torch.Generator().manual_seed(config.seed)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        before = float(evaluate(model))
        rows = []
        for name, layer in prunable_layers(model, config.exclude):
            score = layer.weight.detach().abs().float()
            if config.method == "random":
                score = torch.rand(score.shape, generator=generator).to(score.device)
            for sparsity in sparsities:
                mask = layer_mask(score, config.structure, sparsity)
                after = _judged(model, evaluate, layer.weight, mask)
                rows.append(PruningSensitivity(name, sparsity, after, after - before))
        return rows
    finally:
        for module, mode in modes.items():
            module.training = mode


def _judged(model: nn.Module, evaluate: Callable[[nn.Module], float], weight: Tensor, mask: Tensor) -> float:
    original = weight.detach().clone()
    try:
        weight.masked_fill_(~mask, 0)
        return float(evaluate(model))
    finally:
        weight.copy_(original)
