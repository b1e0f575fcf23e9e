"""Smaller and faster networks: pruning, distillation, quantization."""

from imgopt_fast.compress.distill import distillation_loss
from imgopt_fast.compress.from_onnx import OnnxNetwork, from_onnx
from imgopt_fast.compress.masked_sgd import MaskedSGD
from imgopt_fast.compress.prune import PruneConfig, Pruner, prune, pruning_sensitivity
from imgopt_fast.compress.quantize import Int8Config, profile, qat, quantize, sensitivity
from imgopt_fast.compress.weights import load_into, load_weights, save_weights
from imgopt_fast.nn import pack

__all__ = [
    "Int8Config",
    "MaskedSGD",
    "OnnxNetwork",
    "PruneConfig",
    "Pruner",
    "distillation_loss",
    "from_onnx",
    "load_into",
    "load_weights",
    "pack",
    "profile",
    "prune",
    "pruning_sensitivity",
    "qat",
    "quantize",
    "save_weights",
    "sensitivity",
]
