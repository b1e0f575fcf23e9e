"""Folds the clamps that follow packed layers into them: ReLU, ReLU6, Hardtanh, clamp with numbers.

The kernel clamps a result while it is still in registers, so a clamp of its own is a pass over memory that is saved.
Which clamp follows which layer is read from a trace. A graph is rewritten; in any other model, whose forward is the
user's code, a clamp that is a module becomes `nn.Identity` if each of its calls follows a packed layer, and one that
is a function stays. A model that cannot be traced stays as it is.
"""

from collections.abc import Collection, Iterator
from numbers import Real

import torch
from torch import fx, nn
from torch.nn import functional as F

from imgopt_fast.nn.replace import replace_module

Limits = tuple[float | None, float | None]

RELU: Collection[object] = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
CLAMP: Collection[object] = (torch.clamp, torch.clamp_, "clamp", "clamp_")


class ClampedLayer(nn.Module):
    """A layer whose result the operation clamps to [output_min, output_max]; None: not on that side."""

    output_min: float | None = None
    output_max: float | None = None


def fold_clamps(model: nn.Module) -> None:
    """Give the packed layers of `model` the limits of what follows them, in place, and remove that."""
    graph = model.graph if isinstance(model, fx.GraphModule) else _trace(model)
    if graph is None:
        return
    found = dict(_clamps_of_layers(model, graph))
    if isinstance(model, fx.GraphModule):
        for clamp, (layer, limits) in found.items():
            layer.output_min, layer.output_max = limits
            clamp.replace_all_uses_with(clamp.all_input_nodes[0])
            graph.erase_node(clamp)
        model.recompile()
        return
    for module, calls in _calls(model, graph).items():
        if not isinstance(module, ClampedLayer) and all(call in found for call in calls):
            for call in calls:
                layer, (layer.output_min, layer.output_max) = found[call]
            replace_module(model, module, nn.Identity())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, ClampedLayer) or super().is_leaf_module(module, qualified_name)


def _trace(model: nn.Module) -> fx.Graph | None:
    try:
        return _Tracer().trace(model)
    except Exception:  # the tracer raises what the model's own code raises, too
        return None


def _calls(model: nn.Module, graph: fx.Graph) -> dict[nn.Module, list[fx.Node]]:
    calls: dict[nn.Module, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(model.get_submodule(node.target), []).append(node)
    return calls


def _clamps_of_layers(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, tuple[ClampedLayer, Limits]]]:
    """(clamp, (layer, limits)) where every result of a layer goes into such a clamp, and nowhere else."""
    for layer, calls in _calls(model, graph).items():
        if not isinstance(layer, ClampedLayer) or (layer.output_min, layer.output_max) != (None, None):
            continue
        users = [user for call in calls for user in call.users]
        limits = {_limits(model, user) for user in users}
        if len(users) == len(calls) and len(limits) == 1 and (common := limits.pop()) is not None:
            yield from ((user, (layer, common)) for user in users)


def _limits(model: nn.Module, node: fx.Node) -> Limits | None:
    """What a node clamps its only input to; None where it does something else."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, nn.Hardtanh):  # and ReLU6
            return module.min_val, module.max_val
        return (0.0, None) if isinstance(module, nn.ReLU) else None
    if node.target in RELU:
        return 0.0, None
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target in CLAMP:
        low, high = (*node.args[1:], None, None)[:2]
        low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
        if all(limit is None or isinstance(limit, Real) for limit in (low, high)):
            return low, high  # type: ignore[return-value]
    return None
