"""Rounding that looks at the layer's output instead of at each weight (optional; Frantar et al. 2022, "GPTQ").

The squared error of a layer's sums is a quadratic form of its weights' errors, whose matrix is the second moment of its
inputs. Weights are rounded one after the other, and what each one loses is made good by those still to come, as that
matrix says. It runs in the network as far as it is rounded already, so that a layer sees the inputs it will really get.
Where biases are corrected afterwards, a shift of a layer's mean costs nothing, and the moment is taken about the mean.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from imgopt_fast.compress.quantize.fuse import Operation
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.simulate import Simulation, Values
from imgopt_fast.compress.quantize.weights import LEVELS, quantize_weight

# Added to the diagonal, as a share of its mean: inputs that hardly vary would otherwise take up errors without limit.
DAMPING = 0.01
BLOCK = 64  # columns whose losses stay among them before the others hear of it
# Values of the windows of images that are multiplied at once: 64 MB. Small images one by one would spend their time on
# adding moments.
WINDOWS = 1 << 24
# Inputs of an output up to which it is done: the moment and its inverses then take 2 GB, with 40,000 it would be 50.
MOST_INPUTS = 8192


@torch.no_grad()
def optimize_rounding(plan: Plan, images: Tensor) -> None:
    """Round the weights of the plan's operations, in place, for the inputs that `images` cause.

    Operations of more than MOST_INPUTS inputs an output stay as they are: each weight is then rounded for itself.
    """
    network = Simulation(plan)
    values: Values = {}
    for node in plan.order:
        operation = plan.fusion.operations.get(node)
        if operation is not None and operation.weight is not None and operation.weight[0].numel() <= MOST_INPUTS:
            step = plan.scale_of(operation.inputs[0]).scale
            _, scale = quantize_weight(operation.weight, operation.bias, step, plan.config)
            inputs = network.read(operation, operation.inputs[0], values)
            moment = second_moment(operation, inputs, centred=plan.config.bias_correction)
            operation.rounded_weight, operation.weight_scale = round_to_grid(operation.weight, scale, moment), scale
        network.step(node, values, images)


def second_moment(operation: Operation, inputs: Tensor, *, centred: bool = False) -> Tensor:
    """(groups, K, K) float64: for each group, the sum over all windows of the outer product of its K input values.

    `centred`: of their distances from their means, which leaves out an error that is the same in every window.
    """
    if operation.kind == "linear":
        rows = inputs.flatten(0, -2).double()
        rows = rows - rows.mean(0) if centred else rows
        return (rows.T @ rows)[None]
    assert operation.weight is not None
    attributes = operation.attributes
    (top, bottom), (left, right) = attributes["padding"]
    groups, columns = attributes["groups"], operation.weight[0].numel()
    total = inputs.new_zeros(groups, columns, columns, dtype=torch.float64)
    sums, count, origin = inputs.new_zeros(groups, columns, 1, dtype=torch.float64), 0, inputs.new_zeros(())
    padded = F.pad(inputs, (left, right, top, bottom))
    together = max(1, WINDOWS // (padded[0, 0].numel() * columns * groups))
    for images in padded.split(together):
        windows = F.unfold(images, operation.weight.shape[2:], attributes["dilation"], 0, attributes["stride"])
        windows = windows.view(len(images), groups, columns, -1).permute(1, 2, 0, 3).flatten(2)
        if centred and count == 0:
            origin = windows.mean(2, keepdim=True)  # near the mean: the difference below keeps its digits
        windows = windows - origin
        total += (windows @ windows.mT).double()
        sums += windows.sum(2, keepdim=True).double()
        count += windows.shape[2]
    return total - sums @ sums.mT / count if centred else total


def round_to_grid(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    """`weight` (O, ...) on the grid of `scale` (O,), rounded for the least error under `moment` (groups, K, K).

    What a block of columns loses reaches the columns behind it in one product, which is what makes wide layers
    affordable: 512 outputs of 4608 inputs take a tenth of the time that column by column takes.
    """
    groups, columns = moment.shape[:2]
    step = scale.double().view(groups, -1)
    rows = weight.double().reshape(groups, -1, columns)
    factor = _factor(moment)
    stored = torch.empty_like(rows)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        block, lost = rows[:, :, begin:end].clone(), torch.empty_like(rows[:, :, begin:end])
        inside = factor[:, begin:end, begin:end]
        for column in range(end - begin):
            wanted = block[:, :, column]
            chosen = torch.round(wanted / step).clamp(-LEVELS, LEVELS) * step
            stored[:, :, begin + column] = chosen
            lost[:, :, column] = (wanted - chosen) / inside[:, column, column, None]
            block -= lost[:, :, column, None] * inside[:, None, column]
        rows[:, :, end:] -= lost @ factor[:, begin:end, end:]
    return stored.view_as(weight).to(weight.dtype)


def _factor(moment: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = (moment, damped)⁻¹.

    With the order of rows and columns reversed twice, the Cholesky factor is an upper one, whose inverse is U.
    """
    diagonal = moment.diagonal(dim1=1, dim2=2)
    damped = moment + torch.diag_embed((DAMPING * diagonal.mean(1, keepdim=True)).expand_as(diagonal).clamp(min=1e-12))
    upper = torch.linalg.cholesky(damped.flip(1, 2)).flip(1, 2)
    factor: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper[0])).to(upper), upper=True)
    return factor
