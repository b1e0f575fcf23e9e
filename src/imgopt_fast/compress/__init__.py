"""Smaller and faster networks: pruning, distillation, quantization."""

from imgopt_fast.compress.prune import PruneConfig, Pruner, prune

__all__ = ["PruneConfig", "Pruner", "prune"]
