"""Quantization-aware training: weights learn to live with the rounding that int8 will do to them.

In training mode the network is a differentiable simulation; in evaluation mode it is the int8 network itself, converted
from the present weights, so that what is evaluated is what `convert` returns, bit for bit. Batch norms are folded
before training starts: the scales they would move are the ones being trained for.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.model import Int8Model, to_int8
from imgopt_fast.compress.quantize.names import key
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.simulate import Simulation


class QatModel(nn.Module):
    """A network in quantization-aware training: an ordinary module to any optimiser. Made by `qat`."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        # Searching the weights' scales in every step would cost more than the step.
        self.simulation = Simulation(replace(plan, config=replace(plan.config, calibration="minmax")))
        self._int8: tuple[list[Tensor], Int8Model] | None = None  # the last conversion, and copies of what it read

    def forward(self, images: Tensor) -> Any:
        if self.training:
            return self.simulation(images)
        state = [tensor.detach() for tensor in (*self.parameters(), *self.buffers())]
        # By value: writing through `.data`, as moving averages do, leaves the tensors and their versions as they were.
        if self._int8 is None or not all(map(_equal, self._int8[0], state)):
            self._int8 = ([tensor.clone() for tensor in state], self.convert())
        return self._int8[1](images)

    def convert(self) -> Int8Model:
        """The int8 network of the present weights."""
        plan = self.simulation.plan
        operations = dict(plan.fusion.operations)
        for node, operation in operations.items():
            if operation.weight is not None:
                layer: Any = self.simulation.layers[key(operation.name)]
                operations[node] = replace(operation, weight=layer.weight.detach(), bias=layer.bias.detach())
        trained = replace(plan, fusion=replace(plan.fusion, operations=operations))
        return to_int8(trained, self.simulation.floats)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.device == right.device and torch.equal(left, right)


def qat(model: nn.Module, calibration: Iterable[Any], config: Int8Config | None = None) -> QatModel:
    """Prepare `model` for quantization-aware training; arguments and errors are those of `quantize`.

    Train the result as any network, with a tenth or less of the original learning rate, gradients clipped to a norm
    near 1 (folded batch norms do not keep steps small any more) and for a few epochs; dropout and the batch norms'
    statistics are those of inference. Its `convert()` gives the int8 network, whose output is that of the trained
    module in evaluation mode.
    """
    return QatModel(make_plan(model, calibration, replace(config or Int8Config(), rounding="nearest")))
