"""Quantization to int8: after training (`quantize`) or with training (`qat`),
which layers suffer (`sensitivity`) and which take the time (`profile`).

A model goes through trace, fold, fuse, equalize, calibrate and correct to a `Plan`, and from there to the network of
int8 segments (convert) or to its differentiable simulation (simulate).
"""

from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.model import Int8Model, quantize
from imgopt_fast.compress.quantize.profile import NetworkProfile, StepProfile, profile
from imgopt_fast.compress.quantize.qat import QatModel, qat
from imgopt_fast.compress.quantize.report import LayerReport, QuantizationReport
from imgopt_fast.compress.quantize.sensitivity import LayerSensitivity, sensitivity

__all__ = [
    "Int8Config",
    "Int8Model",
    "LayerReport",
    "LayerSensitivity",
    "NetworkProfile",
    "QatModel",
    "QuantizationReport",
    "StepProfile",
    "profile",
    "qat",
    "quantize",
    "sensitivity",
]
