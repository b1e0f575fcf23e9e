"""Post-training quantization to int8: trace, fold, fuse, calibrate, convert."""

from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.model import Int8Model, quantize
from imgopt_fast.compress.quantize.report import LayerReport, QuantizationReport

__all__ = ["Int8Config", "Int8Model", "LayerReport", "QuantizationReport", "quantize"]
