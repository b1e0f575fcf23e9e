"""Which layer costs the accuracy: the error of the output, or any score of it, when one layer alone is int8."""

import operator
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from imgopt_fast.compress.quantize.calibrate import images_of
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.simulate import Simulation


class LayerSensitivity(NamedTuple):
    """What int8 in layer `name` alone does: signal to noise of the network's output in decibels (low is bad), and what
    the caller's `score` makes of that network, None without one."""

    name: str
    decibels: float
    score: float | None


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    calibration: Iterable[Any],
    config: Int8Config | None = None,
    *,
    score: Callable[[nn.Module], float] | None = None,
) -> list[LayerSensitivity]:
    """Rank the int8 layers of `model`, the most harmful first; `Int8Config.exclude` takes their names.

    Args:
        model, calibration, config: as for `quantize`, with its errors. The noise is measured on the first batch, one
            pass per layer.
        score: called once per layer with the network in which that layer alone is int8; a higher result is better, such
            as the accuracy on a validation set. The ranking then follows it, and the noise among equals.
    """
    batches = images_of(calibration, model)
    first = list(islice(batches, 1))
    simulation = Simulation(make_plan(model, chain(first, batches), config or Int8Config()))
    images = first[0]
    simulation.rounded = lambda operation: False
    exact = _flat(simulation(images))
    ranked = []
    for chosen in simulation.plan.fusion.operations.values():
        if chosen.weight is not None:
            simulation.rounded = partial(operator.is_, chosen)
            noise = (_flat(simulation(images)) - exact).square().mean()
            decibels = float(10 * torch.log10(exact.var() / noise))
            ranked.append(LayerSensitivity(chosen.name, decibels, None if score is None else score(simulation)))
    return sorted(ranked, key=lambda layer: (layer.score or 0.0, layer.decibels))


def _flat(output: Any) -> Tensor:
    """Everything floating that the model returns, as one vector."""
    leaves = pytree.tree_leaves(output)
    return torch.cat([leaf.double().flatten() for leaf in leaves if isinstance(leaf, Tensor)])
