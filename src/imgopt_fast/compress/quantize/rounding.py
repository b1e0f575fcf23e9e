"""Rounding that looks at the layer's output instead of at each weight (optional; Frantar et al. 2022, "GPTQ").

The squared error of a layer's sums is a quadratic form of its weights' errors, whose matrix is the second moment of its
inputs. Weights are rounded one after the other, and what each one loses is made good by those still to come, as that
matrix says. It runs in the network as far as it is rounded already, so that a layer sees the inputs it will really get.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imgopt_fast.compress.quantize.convert import key
from imgopt_fast.compress.quantize.fuse import Operation
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.simulate import Simulation, Values
from imgopt_fast.compress.quantize.weights import LEVELS, quantize_weight

# Added to the diagonal, as a share of its mean: inputs that hardly vary would otherwise take up errors without limit.
DAMPING = 0.01


@torch.no_grad()
def optimize_rounding(plan: Plan, images: Tensor) -> None:
    """Put the weights of the plan's operations onto their int8 grids, in place, for the inputs that `images` cause."""
    network = Simulation(plan)
    values: Values = {}
    for node in plan.order:
        operation = plan.fusion.operations.get(node)
        if operation is not None and operation.weight is not None:
            step = plan.scale_of(operation.inputs[0]).scale
            _, scale = quantize_weight(operation.weight, operation.bias, step, plan.config)
            moment = second_moment(operation, network.read(operation, operation.inputs[0], values))
            operation.weight, operation.weight_scale = round_to_grid(operation.weight, scale, moment), scale
            layer: Any = network.layers[key(operation.name)]
            layer.weight.copy_(operation.weight)
        network.step(node, values, images)


def second_moment(operation: Operation, inputs: Tensor) -> Tensor:
    """(groups, K, K) float64: for each group, the sum over all windows of the outer product of its K input values."""
    if operation.kind == "linear":
        rows = inputs.flatten(0, -2).double()
        return (rows.T @ rows)[None]
    assert operation.weight is not None
    attributes = operation.attributes
    (top, bottom), (left, right) = attributes["padding"]
    groups = attributes["groups"]
    total = inputs.new_zeros(groups, *[operation.weight[0].numel()] * 2, dtype=torch.float64)
    for image in F.pad(inputs, (left, right, top, bottom)).split(1):
        windows = F.unfold(image, operation.weight.shape[2:], attributes["dilation"], 0, attributes["stride"])
        windows = windows.view(groups, -1, windows.shape[-1])
        total += (windows @ windows.mT).double()
    return total


def round_to_grid(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """`weight` (O, ...) on the grid of `scale` (O,), rounded for the least error under `moment` (groups, K, K)."""
    groups, columns = moment.shape[:2]
    step = scale.double().view(groups, -1)
    rows = weight.double().reshape(groups, -1, columns)
    diagonal = moment.diagonal(dim1=1, dim2=2)
    damped = moment + torch.diag_embed((DAMPING * diagonal.mean(1, keepdim=True)).expand_as(diagonal).clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    stored = torch.empty_like(rows)
    for column in range(columns):
        wanted = rows[:, :, column]
        stored[:, :, column] = torch.round(wanted / step).clamp(-LEVELS, LEVELS) * step
        lost = (wanted - stored[:, :, column]) / factor[:, column, column, None]
        rows[:, :, column + 1 :] -= lost[:, :, None] * factor[:, None, column, column + 1 :]
    return stored.view_as(weight).to(weight.dtype)
