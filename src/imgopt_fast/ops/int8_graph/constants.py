"""What a plan keeps beside its words: blocks of bytes, and the numbers of every channel as the kernels read them."""

import math
import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imgopt_fast import _arguments as arguments
from imgopt_fast.ops.int8_conv2d import PackedInt8Weight

CHANNEL_SLACK = 64
ALIGNMENT = 64  # bytes, of every block in `constants` and `packed`


@dataclass
class Blob:
    """Blocks of bytes, each aligned, in one tensor."""

    blocks: list[Tensor] = field(default_factory=list)
    size: int = 0

    def add(self, block: Tensor) -> int:
        at = self.size
        flat = block.detach().cpu().contiguous().view(-1)
        raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        self.blocks += [raw, torch.zeros(-raw.numel() % ALIGNMENT, dtype=torch.uint8)]
        self.size += raw.numel() + (-raw.numel() % ALIGNMENT)
        return at

    def tensor(self) -> Tensor:
        return torch.cat(self.blocks) if self.blocks else torch.empty(0, dtype=torch.uint8)


def offsets(layer: PackedInt8Weight, input_dtype: torch.dtype) -> Tensor:
    """int32 bias - z * ΣW of every channel, z the zero point of the input's bytes as the kernels see them.

    The kernels flip the top bit of int8 input, which adds 128. Wrapping is harmless: the final sum fits.
    """
    zero_point = layer.input_zero_point + (128 if input_dtype == torch.int8 else 0)
    return (layer.bias.long() - zero_point * layer.weight.long().flatten(1).sum(1)).to(torch.int32)


def multipliers(layer: PackedInt8Weight, output_scale: float) -> Tensor:
    """float32 factors from sums to steps of the output."""
    return (layer.input_scale * layer.weight_scale.double() / output_scale).to(torch.float32)


def shifts(layer: PackedInt8Weight, output_scale: float, residual_scale: float | None) -> Tensor:
    """int8 (O, 4): right, sum_left, residual_left, 0; what `Int8Shift` in csrc/int8_conv2d/contract.h says."""
    fine = 1 - torch.frexp(layer.input_scale * layer.weight_scale.double())[1].long()
    residual_fine = fine if residual_scale is None else torch.full_like(fine, exponent(residual_scale))
    finest = torch.maximum(fine, residual_fine)
    right = (finest - exponent(output_scale)).clamp(-31, 62)
    fields = (
        right,
        (finest - fine).clamp(max=arguments.SUM_LEFT_MAX),
        (finest - residual_fine).clamp(max=arguments.RESIDUAL_LEFT_MAX),
        torch.zeros_like(fine),
    )
    return torch.stack(fields, 1).to(torch.int8)


def with_slack(entries: Tensor) -> Tensor:
    slack = torch.zeros((CHANNEL_SLACK, *entries.shape[1:]), dtype=entries.dtype)
    return torch.cat([entries, slack])


def exponent(scale: float) -> int:
    """p of scale = 2^-p."""
    return 1 - math.frexp(scale)[1]


def f32(value: float) -> int:
    """Bit pattern of the nearest float32."""
    nearest = float(torch.tensor(value, dtype=torch.float64).to(torch.float32))
    bits: int = struct.unpack("<I", struct.pack("<f", nearest))[0]
    return bits
