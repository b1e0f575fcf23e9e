"""Which layer costs the accuracy: the error of the output when one layer alone is int8."""

import operator
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from imgopt_fast.compress.quantize.calibrate import images_of
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.simulate import Simulation


class LayerSensitivity(NamedTuple):
    """Signal to noise of the network's output, in decibels, when only layer `name` is int8: low is bad."""

    name: str
    decibels: float


@torch.no_grad()
def sensitivity(
    model: nn.Module, calibration: Iterable[Any], config: Int8Config | None = None
) -> list[LayerSensitivity]:
    """Rank the int8 layers of `model`, the most harmful first; `Int8Config.exclude` takes their names.

    Arguments and errors are those of `quantize`. The error is measured on the first batch: one pass per layer.
    """
    batches = list(calibration)
    simulation = Simulation(make_plan(model, batches, config or Int8Config()))
    images = next(images_of(batches, model))
    simulation.rounded = lambda operation: False
    exact = _flat(simulation(images))
    ranked = []
    for chosen in simulation.plan.fusion.operations.values():
        if chosen.weight is not None:
            simulation.rounded = partial(operator.is_, chosen)
            noise = (_flat(simulation(images)) - exact).square().mean()
            ranked.append(LayerSensitivity(chosen.name, float(10 * torch.log10(exact.var() / noise))))
    return sorted(ranked, key=lambda layer: layer.decibels)


def _flat(output: Any) -> Tensor:
    """Everything floating that the model returns, as one vector."""
    leaves = pytree.tree_leaves(output)
    return torch.cat([leaf.double().flatten() for leaf in leaves if isinstance(leaf, Tensor)])
