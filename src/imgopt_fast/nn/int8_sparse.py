"""Pruned layers of an int8 segment over their kept weights only, where that is faster than int8 with zeros.

The results are those of the dense kernel, bit for bit, so which of the two runs is a question of time alone, and a
pure function of the layer's shape, its zeros and the number of images. Int8 dot products do four multiply-adds where
the sparse kernel does one, which is why few layers qualify.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast._arguments import as_pair, as_sides
from imgopt_fast.nn.int8 import Int8Conv2d, Int8Linear, Requantize
from imgopt_fast.ops.int8_conv2d import reference
from imgopt_fast.ops.masked_matmul import int8_masked_matmul, pack_int8_masked_weight

if TYPE_CHECKING:
    from imgopt_fast.nn.int8_segment import Step

# Fewest inputs of a layer, and the largest share of its weights that may be there. One Zen 5 core with AVX-512, against
# int8_conv2d: 1024 x 1024 at 2 % is 1.2 times as fast from 16 images on and 1.36 times at 256, at 5 % 0.92 and 1.04;
# 1000 x 2048 at 5 % 1.05, 512 x 2048 1.29 and 4096 x 4096 1.53 to 1.77 times. A single image is slower everywhere.
LARGEST_DENSITY = ((2048, 0.05), (1024, 0.02))
FEWEST_IMAGES = 16
EXACT = 2**24  # sums below it are exact in float32
MENTIONED = 0.3  # share of zeros from which a report speaks of a layer as pruned

Layer = Int8Conv2d | Int8Linear


class SparseLayer:
    """A linear layer or 1×1 convolution of a segment; called with its quantized input, gives its output."""

    def __init__(self, layer: Layer, requantize: Requantize) -> None:
        self.layer, self.requantize = layer, requantize
        weight = layer.weight_int8.flatten(1)
        self.packed = pack_int8_masked_weight(
            weight, weight != 0, layer.weight_scale, layer.bias,
            input_scale=layer.input_scale.item(), input_zero_point=int(layer.input_zero_point),
        )  # fmt: skip

    def __call__(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return self._rows(input)
        return self._rows(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # channels_last memory, as rows are

    def _rows(self, rows: Tensor) -> Tensor:
        layer = self.layer
        low, high = layer.output_min, layer.output_max
        if layer.output_scale is None:
            return int8_masked_matmul(rows, self.packed, output_min=low, output_max=high)
        scale, zero_point = layer.output_scale.item(), int(layer.output_zero_point)
        if self.requantize == "float":
            return int8_masked_matmul(
                rows, self.packed, output_scale=scale, output_zero_point=zero_point, output_dtype=torch.uint8,
                output_min=low, output_max=high,
            )  # fmt: skip
        # Shifts: the float results are the exact sums times powers of two.
        step = self.packed.input_scale * self.packed.weight_scale.double()
        sums = int8_masked_matmul(rows, self.packed).double() / step
        result = reference.requantize(
            sums.reshape(-1, sums.shape[-1], 1, 1), step, None, scale, zero_point, torch.uint8, low, high, 1.0, 0, True
        )  # fmt: skip
        return result.reshape(sums.shape)


def sparse_layer(step: "Step", layer: Any, requantize: Requantize) -> SparseLayer | None:
    """The step over the kept weights of its layer, None where it is better dense."""
    if not _fits(step, layer) or not wins(layer.weight_int8) or _native.backend() != "native":
        return None
    if requantize == "shift" and not _exact(layer):
        return None
    return SparseLayer(layer, requantize)


def wins(weight: Tensor) -> bool:
    """Whether an int8 weight (O, ...) has so few values that the sparse kernel is the faster one."""
    columns = weight[0].numel() if len(weight) else 0
    limit = next((density for fewest, density in LARGEST_DENSITY if columns >= fewest), 0.0)
    return int(weight.count_nonzero()) <= limit * weight.numel()


def describe_zeros(step: "Step", layer: Any, *, sparse: bool) -> str:
    """How a report speaks of the zeros of a layer; "" where there are few."""
    zeros = 1 - int(layer.weight_int8.count_nonzero()) / max(1, layer.weight_int8.numel())
    if zeros < MENTIONED:
        return ""
    if sparse:
        return f"{zeros:.0%} zeros, skipped for {FEWEST_IMAGES} images and more"
    if not _fits(step, layer):
        return f"{zeros:.0%} zeros, dense: only linear layers and plain 1x1 convolutions skip them"
    return f"{zeros:.0%} zeros, dense: faster than skipping them"


def _fits(step: "Step", layer: Any) -> bool:
    """A product of rows with one matrix, nothing added, on the CPU."""
    if step.residual is not None or layer.weight_int8.device.type != "cpu":
        return False
    if step.kind == "linear":
        return True
    unpadded, every_pixel = not any(as_sides(layer.padding)), as_pair("stride", layer.stride, 1) == [1, 1]
    return unpadded and every_pixel and layer.groups == 1 and tuple(layer.weight_int8.shape[2:]) == (1, 1)


def _exact(layer: Layer) -> bool:
    """Whether no sum can leave the integers that float32 holds."""
    largest = layer.weight_int8.flatten(1).long().abs().sum(1).double() * 255
    if layer.bias is not None:
        largest += (layer.bias.double() / (layer.input_scale.double() * layer.weight_scale.double())).abs() + 1
    return bool((largest < EXACT).all())
