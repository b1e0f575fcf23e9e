"""Layers that run on the library's operations, drop-in for torch's own."""

from imgopt_fast.nn.int8 import Int8Conv2d, Int8Linear
from imgopt_fast.nn.int8_segment import Int8Segment, Step
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear
from imgopt_fast.nn.packed import PackedMaskedConv2d, PackedMaskedLinear, pack

__all__ = [
    "Int8Conv2d",
    "Int8Linear",
    "Int8Segment",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedMaskedConv2d",
    "PackedMaskedLinear",
    "Step",
    "pack",
]
