"""Scales that are powers of two, where free ones would be.

A power of two is up to a factor of two coarser than the scale that a tensor wants, one bit of eight. But a tensor that
int8 operations alone make and read has units that nobody sees: the layer that makes it may be multiplied by a constant
and those that read it divided, for ReLU, pools, adds and concats commute with that. So the constant is chosen that puts
a power of two where the free scale was. What an add or a concat joins shares one constant. A clamp from above, as in
ReLU6, becomes the end of the range.

EfficientNet-Lite0 with its published weights has 20.0 dB of signal to noise in its logits with this and second-order
rounding about the mean, 17.5 with rounding to the nearest, 16.8 with neither; free scales rounded to the nearest 21.1.
"""

import math

from torch.fx import Node

from imgopt_fast.compress.quantize.calibrate import LEVELS, Histogram, Scale, choose_range, expected_error
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.fuse import Fusion, Operation

SLACK = 1 + 1e-9  # of a bound that a range of the same size shall meet


def choose_powers_of_two(fusion: Fusion, histograms: dict[Node, Histogram], config: Int8Config) -> dict[Node, Scale]:
    """A scale for each tensor of `histograms`, after multiplying operations of `fusion`, in place, so that it fits."""
    ranges = {node: choose_range(histogram, config) for node, histogram in histograms.items()}
    scales: dict[Node, Scale] = {}
    factors: dict[Node, float] = {}
    for group in _groups(fusion):
        members = [node for node in group if node in histograms]
        free = all(_is_free(fusion, node) for node in group)
        units = {_mantissa(ranges[node]) for node in members} if free else {1.0}
        choices = []
        for unit in units:
            found = {node: _nearest(fusion, node, histograms[node], ranges[node], unit, free) for node in members}
            # Rounding's share of each tensor's energy: such shares add up along a network.
            noise = sum(error / (histograms[node].energy or 1.0) for node, (error, _) in found.items())
            choices.append((noise, unit, {node: scale for node, (_, scale) in found.items()}))
        if choices:
            _, unit, chosen = min(choices, key=lambda choice: choice[:2])
            scales |= chosen
            factors |= dict.fromkeys(group if free else (), 1 / unit)
    for operation in fusion.operations.values():
        if operation.output in factors or operation.inputs[0] in factors:
            _multiply(operation, factors.get(operation.inputs[0], 1.0), factors.get(operation.output, 1.0))
            operation.saturates = operation.output in factors and operation.maximum is not None
    return {node: scales[node] for node in histograms}


def _groups(fusion: Fusion) -> list[list[Node]]:
    """The tensors that int8 operations read and write, those together that one factor has to serve."""
    group_of: dict[Node, list[Node]] = {}
    for operation in fusion.operations.values():
        tied = [operation.output] if operation.weight is not None else [operation.output, *operation.inputs]
        tied += [] if operation.residual is None else [operation.residual]
        for node in (operation.output, *operation.sources):
            group_of.setdefault(node, [node])
        joined = list(dict.fromkeys(member for node in tied for member in group_of[node]))
        group_of |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in group_of.values()}.values())


def _is_free(fusion: Fusion, node: Node) -> bool:
    """Whether int8 operations alone make and read the tensor, and what clamps it can move with it."""
    operation = fusion.operations.get(node)
    if operation is None or any(reader not in fusion.operations for reader in fusion.readers[node]):
        return False
    return not operation.clamped or operation.minimum == 0


def _mantissa(bounds: tuple[float, float]) -> float:
    """The free scale of the range over the power of two below it: in [1, 2)."""
    return 2 * math.frexp((bounds[1] - bounds[0]) / LEVELS)[0]


def _nearest(
    fusion: Fusion, node: Node, histogram: Histogram, bounds: tuple[float, float], unit: float, free: bool
) -> tuple[float, Scale]:
    """(expected error, scale) of the better power of two times `unit` on either side of the free scale.

    The scale is the power of two alone. Where a clamp shall be the end of the range, the range stays below it.
    """
    low, high = bounds
    operation = fusion.operations.get(node)
    largest = operation.maximum if free and operation is not None and operation.maximum is not None else math.inf
    below = math.floor(math.log2((high - low) / LEVELS / unit * SLACK))
    choices = []
    for power in (2.0**below, 2.0 ** (below + 1)):
        step = power * unit
        start = low * min(1.0, step * LEVELS / (high - low))
        zero_point = min(LEVELS, max(0, round(-start / step)))
        if power == 2.0**below or (LEVELS - zero_point) * step <= largest * SLACK:
            choices.append((expected_error(histogram, step, zero_point), Scale(power, zero_point)))
    return min(choices)


def _multiply(operation: Operation, read: float, made: float) -> None:
    """Let the operation read its input times `read`, and make its output times `made`."""
    if operation.weight is not None:
        operation.weight = operation.weight * (made / read)
        operation.bias = None if operation.bias is None else operation.bias * made
    operation.maximum = None if operation.maximum is None else operation.maximum * made
