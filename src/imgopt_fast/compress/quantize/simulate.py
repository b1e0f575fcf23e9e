"""The float graph with its int8 operations rounding as the kernels do, in float arithmetic and differentiable.

What quantization-aware training, bias correction and the sensitivity analysis share. Rounding passes gradients straight
through, a value that saturates passes none (Bengio et al. 2013; Jacob et al. 2018). It differs from the kernels in the
order of float sums only, so a value can land on the other side of a rounding boundary: one step.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node, map_arg

from imgopt_fast.compress.quantize.calibrate import LEVELS, Scale
from imgopt_fast.compress.quantize.convert import copy_attribute
from imgopt_fast.compress.quantize.fuse import PASSING, Operation
from imgopt_fast.compress.quantize.names import key
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.weights import quantize_weight

Values = dict[Node, Any]


class SimulatedLayer(nn.Module):
    """The folded weight and bias of an int8 layer."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())


class SimulatedLinear(SimulatedLayer):
    """Of a linear layer, whose call with the rounded parameters can be hooked, as those of nn.Linear are."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def forward(self, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(images, weight, bias)


class Simulation(nn.Module):
    """Runs a plan. Its parameters are the folded weights and biases of the int8 layers and those of the float parts.

    `rounded` decides for each operation whether it rounds; at first all do.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.rounded: Callable[[Operation], bool] = _always
        self.layers = nn.ModuleDict()
        self.floats = nn.Module()
        for node in plan.order:
            operation = plan.fusion.operations.get(node)
            if node.op == "get_attr":
                copy_attribute(plan.graph, self.floats, str(node.target), trainable=True)
            elif operation is not None and operation.weight is not None:
                bias = operation.weight.new_zeros(len(operation.weight)) if operation.bias is None else operation.bias
                made = SimulatedLinear if operation.kind == "linear" else SimulatedLayer
                self.layers[key(operation.name)] = made(operation.weight, bias)

    def forward(self, images: Tensor) -> Any:
        values: Values = {}
        for node in self.plan.order:
            self.step(node, values, images.float())
        return map_arg(self.plan.output.args[0], values.__getitem__)

    def step(self, node: Node, values: Values, images: Tensor) -> None:
        """Compute the value of `node`."""
        operation = self.plan.fusion.operations.get(node)
        if operation is not None:
            values[node] = self.finish(operation, self.sums(operation, values), values)
        elif node.op == "placeholder":
            values[node] = images
        elif node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(self.floats)
        else:
            function: Any = node.target
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = function(*args, **kwargs)
        self.forget(node, values)

    def forget(self, node: Node, values: Values) -> None:
        """Drop the values that `node` was the last to read."""
        for dead in self.plan.last_read.get(node, ()):
            values.pop(dead, None)

    def sums(self, operation: Operation, values: Values) -> Tensor:
        """What the operation computes before residual, clamp and rounding."""
        inputs = [self.read(operation, source, values) for source in operation.inputs]
        attributes = operation.attributes
        if operation.weight is not None:
            parameters = self._weights(operation)
            if operation.kind == "linear":
                product: Tensor = self.layers[key(operation.name)](inputs[0], *parameters)
                return product
            (top, bottom), (left, right) = attributes["padding"]
            padded = F.pad(inputs[0], (left, right, top, bottom))
            stride, dilation, groups = (attributes[name] for name in ("stride", "dilation", "groups"))
            return F.conv2d(padded, *parameters, stride, 0, dilation, groups)
        if operation.kind == "add":
            return torch.add(*inputs)
        if operation.kind == "concat":
            return torch.cat(inputs, 1)
        if operation.kind == "max_pool2d":
            pooled: Tensor = F.max_pool2d(inputs[0], **attributes)
            return pooled
        if operation.kind == "avg_pool2d":
            return F.avg_pool2d(inputs[0], **attributes)
        if operation.kind == "global_avg_pool2d":
            return torch.mean(inputs[0], (2, 3), keepdim=not attributes["flat"])
        return torch.flatten(inputs[0], 1) if operation.kind == "flatten" else inputs[0]

    def finish(self, operation: Operation, sums: Tensor, values: Values) -> Tensor:
        """Residual, clamp, and rounding to the output's scale."""
        if operation.residual is not None:
            sums = sums + self.read(operation, operation.residual, values)
        if operation.minimum is not None or operation.maximum is not None:
            sums = sums.clamp(operation.minimum, operation.maximum)
        stays = operation.kind in PASSING or self.plan.fusion.gives_float(operation)
        if stays or not self.rounded(operation):
            return sums
        # With powers of two the sums are exact in float as well, and often halfway between two steps: shifts round up.
        return fake_quantize(sums, self.plan.scales[operation.output], halves_up=self.plan.config.power_of_two)

    def read(self, operation: Operation, source: Node, values: Values) -> Tensor:
        """What `operation` sees of a value: rounded where the operation rounds and the value is not yet."""
        value: Tensor = values[source]
        producer = self.plan.fusion.operations.get(source)
        if not self.rounded(operation) or (producer is not None and self.rounded(producer)):
            return value
        return fake_quantize(value, self.plan.scale_of(source))

    def _weights(self, operation: Operation) -> tuple[Tensor, Tensor]:
        layer: Any = self.layers[key(operation.name)]
        if not self.rounded(operation):
            return layer.weight, layer.bias
        step = self.plan.scale_of(operation.inputs[0]).scale
        source = layer.weight if operation.rounded_weight is None else operation.rounded_weight
        stored, scale = quantize_weight(source, layer.bias, step, self.plan.config, operation.weight_scale)
        weight = stored.to(layer.weight.dtype) * scale.view(-1, *[1] * (stored.ndim - 1))
        bias = torch.round(layer.bias.detach() / (step * scale)) * (step * scale)
        return layer.weight + (weight - layer.weight).detach(), layer.bias + (bias - layer.bias).detach()


def fake_quantize(values: Tensor, scale: Scale, *, halves_up: bool = False) -> Tensor:
    """`values` as uint8 would hold them, in real units; the gradient is that of the clamp to the range."""
    inside = values.clamp(-scale.zero_point * scale.scale, (LEVELS - scale.zero_point) * scale.scale)
    steps = inside / scale.scale
    stored = torch.floor(steps + 0.5) if halves_up else torch.round(steps)
    return inside + (stored * scale.scale - inside).detach()


def _always(operation: Operation) -> bool:
    return True
