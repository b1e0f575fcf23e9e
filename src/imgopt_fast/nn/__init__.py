"""Layers that run on the library's operations, drop-in for torch's own."""

from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear

__all__ = ["MaskedConv2d", "MaskedLinear"]
