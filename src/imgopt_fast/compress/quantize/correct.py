"""Bias correction: rounding shifts the mean of a channel, and the bias can take the shift out (Nagel et al. 2019).

The shift is measured, not derived: one batch goes through the float and the rounded network side by side, and each
layer is corrected before the next one is measured, so that clipping and what earlier layers lost count as well.
"""

import torch
from torch import Tensor

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
        if operation is None or operation.weight is None:
            exact.step(node, exact_values, images)
            rounded.step(node, rounded_values, images)
            continue
        wanted, got = exact.sums(operation, exact_values), rounded.sums(operation, rounded_values)
        shift = (wanted - got).mean([axis for axis in range(got.ndim) if axis != 1], keepdim=True)
        operation.bias = shift.flatten() if operation.bias is None else operation.bias + shift.flatten()
        exact_values[node] = exact.finish(operation, wanted, exact_values)
        rounded_values[node] = rounded.finish(operation, got + shift, rounded_values)
        exact.forget(node, exact_values)
        rounded.forget(node, rounded_values)
