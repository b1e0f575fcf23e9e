"""Pruning: layers get masks, a schedule tightens or moves them, and pruned weights stay exactly zero.

    pruner = prune(model, PruneConfig(sparsity=0.9, start_step=100, end_step=2000, update_every=50), optimizer)
    for batch in loader:
        ...
        optimizer.step()
        pruner.step()
    print(pruner.report(images))

The sparsity follows the cubic ramp of Zhu and Gupta, "To prune, or not to prune" (2017). An optimizer that is given
keeps no memory of pruned weights: momentum and the Adam moments are zeroed with them, so that neither they nor weight
decay can bring one back between two steps; `MaskedSGD` never touches them in the first place.
"""

from imgopt_fast.compress.prune.apply import prunable_layers, prune
from imgopt_fast.compress.prune.channels import ChannelPruner, ChannelReport
from imgopt_fast.compress.prune.config import PruneConfig
from imgopt_fast.compress.prune.pruner import Pruner, masked_layers
from imgopt_fast.compress.prune.report import LayerReport, PruningReport
from imgopt_fast.compress.prune.sensitivity import PruningSensitivity, pruning_sensitivity

__all__ = [
    "ChannelPruner",
    "ChannelReport",
    "LayerReport",
    "PruneConfig",
    "Pruner",
    "PruningReport",
    "PruningSensitivity",
    "masked_layers",
    "prunable_layers",
    "prune",
    "pruning_sensitivity",
]
