"""Smaller and faster networks: pruning, distillation, quantization."""

from imgopt_fast.compress.distill import distillation_loss
from imgopt_fast.compress.masked_sgd import MaskedSGD
from imgopt_fast.compress.prune import PruneConfig, Pruner, prune, pruning_sensitivity
from imgopt_fast.compress.quantize import Int8Config, profile, qat, quantize, sensitivity

__all__ = [
    "Int8Config",
    "MaskedSGD",
    "PruneConfig",
    "Pruner",
    "distillation_loss",
    "profile",
    "prune",
    "pruning_sensitivity",
    "qat",
    "quantize",
    "sensitivity",
]
