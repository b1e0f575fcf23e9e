"""Bias correction: rounding shifts the mean of a channel, and the bias can take the shift out (Nagel et al. 2019).

The shift is measured, not derived: one batch goes through the float and the rounded network side by side, and each
layer is corrected before the next one is measured, so that clipping and what earlier layers lost count as well.
"""

from typing import Any

import torch
from torch import Tensor

from imgopt_fast.compress.quantize.convert import key
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.simulate import Simulation, Values


@torch.no_grad()
def correct_bias(plan: Plan, images: Tensor) -> None:
    """Correct the biases of the plan's operations, in place, on `images`."""
    exact, rounded = Simulation(plan), Simulation(plan)
    exact.rounded = lambda operation: False
    exact_values: Values = {}
    rounded_values: Values = {}
    for node in plan.order:
        operation = plan.fusion.operations.get(node)
        if operation is not None and operation.weight is not None:
            difference = exact.sums(operation, exact_values) - rounded.sums(operation, rounded_values)
            layer: Any = rounded.layers[key(operation.name)]
            layer.bias += difference.mean([axis for axis in range(difference.ndim) if axis != 1])
            operation.bias = layer.bias.detach()
        exact.step(node, exact_values, images)
        rounded.step(node, rounded_values, images)
