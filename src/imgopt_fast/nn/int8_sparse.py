"""Pruned layers of an int8 segment over their kept weights only, where that is faster than int8 with zeros.

The results are those of the dense kernel, bit for bit, so which of the two runs is a question of time alone, and a
pure function of the layer's shape, its zeros and the number of images. Both multiply four neighbouring columns at once;
the sparse kernel leaves out groups that are zero as a whole.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast._arguments import as_pair, as_sides
from imgopt_fast.nn.int8 import Int8Conv2d, Int8Linear, Requantize
from imgopt_fast.ops.int8_conv2d import reference
from imgopt_fast.ops.masked_matmul import int8_masked_matmul, pack_int8_masked_weight
from imgopt_fast.ops.masked_matmul.int8 import GROUP

if TYPE_CHECKING:
    from imgopt_fast.nn.int8_segment import Step

# Fewest inputs of a layer, and the largest share of its groups of four neighbouring weights that may be there, from 16
# images on; benchmarks/tune_masked_matmul.py measures and prints it. One Zen 5 core with AVX-512. At random 5 % of the
# weights are 19 % of the groups, 10 % are 34 %: the sparse kernel is then 1.2 and 0.8 times as fast as int8_conv2d for
# 1024 inputs and 256 images, 1.7 and 1.1 times for 2048, 2.0 and 1.3 times for 4096. A single image is slower. Where a
# set is not named the dense kernel knows instructions that the sparse one does not use, and nothing is skipped.
LARGEST_SHARE: dict[str | None, tuple[tuple[int, float], ...]] = {
    "avx2": ((512, 0.48), (256, 0.34)),
    "avx512": ((2048, 0.34), (1024, 0.2)),
    "neon": ((2048, 0.34), (1024, 0.25)),  # which has dot products too, unlike AVX2; not measured
}
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
    """Whether an int8 weight (O, ...) has so few groups of four that the sparse kernel is the faster one."""
    rows = weight.flatten(1)
    table = LARGEST_SHARE.get(_native.active_isa(), ())
    limit = next((share for fewest, share in table if rows.shape[1] >= fewest), 0.0)
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).any(2)
    return bool(int(groups.sum()) <= limit * groups.numel())


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
