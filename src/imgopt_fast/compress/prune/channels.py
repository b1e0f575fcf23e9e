"""Channel pruning: whole channels are taken out of the network, which stays dense and becomes smaller.

The groups of channels that go together come from coupling.py. Layers that make the same groups, such as those on one
residual path, form a family; each family loses the same share of its channels, or all are ranked together after
scaling each family's scores to a mean of one. Parameters stay the same objects and change their shape, so that an
optimizer made before goes on to work, its state cut with them.
"""

import copy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.compress.prune.config import PruneConfig
from imgopt_fast.compress.prune.coupling import ChannelGroup, channel_groups
from imgopt_fast.compress.prune.pruner import Pruner, masked_layers
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear


class ChannelReport(NamedTuple):
    """A layer that lost channels: the shape of its weight before and after."""

    name: str
    before: tuple[int, ...]
    shape: tuple[int, ...]


class ChannelPruner(Pruner):
    """Removes the channels of a model along a schedule. Call `step()` after every `optimizer.step()`.

    Wrap the model in DistributedDataParallel after the last removal only: it remembers shapes. A state that is loaded
    removes the channels that were removed when it was saved; load it before the model's and the optimizer's.
    """

    def __init__(
        self, model: nn.Module, config: PruneConfig, example: Any, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        if any(masked_layers(model)):
            raise ValueError("model: expected one without masks; remove channels first, then prune what is left")
        images = example[0] if isinstance(example, (tuple, list)) else example
        self.groups = channel_groups(model, images, config.exclude)
        if not self.groups:
            raise ValueError(
                "model: no channel can be removed: those of nn.Conv2d and nn.Linear layers can, but for what `exclude` "
                "names and what the network gives out"
            )
        self.removed: set[int] = set()
        # What is left of each tensor along each axis, as indices of the original.
        self._left: dict[tuple[str, int], list[int]] = {}
        self._before = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self._try(model, images, config)
        super().__init__(model, config, optimizer)

    @property
    def sparsity(self) -> float:
        """Share of the removable channels that are gone."""
        return len(self.removed) / len(self.groups) if self.groups else 0.0

    def report(self, example: Any = None) -> tuple[ChannelReport, ...]:  # type: ignore[override]
        """The layers that became smaller; `example` is not used."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        return tuple(
            ChannelReport(name.removesuffix(".weight"), self._before[name], shape)
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) > 1 and shape != self._before[name]
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule, and which groups are gone."""
        return {"steps": self.steps, "removed": sorted(self.removed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the schedule where `state` left it and remove what was removed; load this before the model's state.

        Raises ValueError where this model has lost channels that the state still has.
        """
        removed = set(state["removed"])
        if not self.removed <= removed:
            raise ValueError("state: expected one with fewer channels; load it into a model that was not pruned yet")
        self._remove(removed - self.removed)
        self.steps = int(state["steps"])

    def _announce(self) -> None:
        """Nothing regrows."""

    def _zero(self) -> None:
        """Nothing is masked: what is pruned is gone."""

    def _prune_to(self, sparsity: float) -> None:
        families: dict[tuple[str, ...], list[int]] = {}
        for index, group in enumerate(self.groups):
            families.setdefault(group.layers, []).append(index)
        scores = self._channel_scores()
        doomed: list[int] = []
        if self.config.scope == "layer":
            for members in families.values():
                ranked = sorted(members, key=scores.__getitem__)
                doomed += ranked[: min(round(sparsity * len(members)), len(members) - 1)]
        else:
            best = {max(members, key=scores.__getitem__) for members in families.values()}  # a layer keeps one channel
            means = {layers: sum(scores[i] for i in m if scores[i] > 0) / len(m) for layers, m in families.items()}
            ranked = sorted(range(len(self.groups)), key=lambda i: scores[i] / (means[self.groups[i].layers] or 1.0))
            doomed = [i for i in ranked if i not in best][: round(sparsity * len(ranked))]
        self._remove(set(doomed) - self.removed)

    def _channel_scores(self) -> list[float]:
        """The magnitude of each group, those that are gone below all others."""
        if self.config.method == "random":
            generator = torch.Generator().manual_seed(self.config.seed)
            scores = torch.rand(len(self.groups), generator=generator).tolist()
        else:
            parameters, norms = dict(self.model.named_parameters()), dict[str, list[float]]()
            places: dict[str, dict[int, int]] = {}
            for name in {s.tensor for group in self.groups for s in group.made}:
                norms[name] = parameters[name].detach().float().flatten(1).square().sum(1).tolist()
                left = self._left.get((name, 0), list(range(len(norms[name]))))
                places[name] = {original: at for at, original in enumerate(left)}
            scores = [
                0.0 if index in self.removed else sum(norms[s.tensor][places[s.tensor][s.at]] for s in group.made)
                for index, group in enumerate(self.groups)
            ]
        return [-1.0 if index in self.removed else score for index, score in enumerate(scores)]

    def _try(self, model: nn.Module, images: Tensor, config: PruneConfig) -> None:
        """Whether the network still runs without half of every layer: sizes written into its code do not change."""
        twin = copy.copy(self)
        twin.removed, twin._left, twin.optimizer, twin.config = set(), {}, None, config
        twin.model = copy.deepcopy(model).eval()
        families = {group.layers: index for index, group in enumerate(self.groups)}
        twin._remove(set(range(0, len(self.groups), 2)) - set(families.values()))
        try:
            with torch.no_grad():
                twin.model(images)
        except Exception as refusal:  # whatever the model's own code raises
            raise ValueError(
                f"model: it does not run with fewer channels: {refusal}\n"
                "Compute sizes in forward from the tensors, or name the layers in front of them in PruneConfig(exclude)"
            ) from refusal

    @torch.no_grad()
    def _remove(self, groups: set[int]) -> None:
        """Take the slices of these groups out of every tensor that has some."""
        gone: dict[tuple[str, int], set[int]] = {}
        for index in groups:
            for piece in self.groups[index].slices:
                gone.setdefault((piece.tensor, piece.axis), set()).add(piece.at)
        for (name, axis), indices in gone.items():
            owner, attribute = _owner(self.model, name)
            left = self._left.get((name, axis))
            if left is None:
                left = list(range(getattr(owner, attribute).shape[axis]))
            keep = [at for at, original in enumerate(left) if original not in indices]
            self._left[name, axis] = [left[at] for at in keep]
            self._cut(owner, attribute, axis, torch.tensor(keep))
        for name in {name.rpartition(".")[0] for name, _ in gone}:
            describe_size(self.model.get_submodule(name))
        self.removed |= groups

    def _cut(self, owner: nn.Module, attribute: str, axis: int, keep: Tensor) -> None:
        tensor = getattr(owner, attribute)
        keep = keep.to(tensor.device)
        if not isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, tensor.index_select(axis, keep))
            return
        state = self.optimizer.state.get(tensor, {}) if self.optimizer is not None else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == tensor.shape:
                state[key] = _select(value, axis, keep)
        grad, tensor.grad = tensor.grad, None
        tensor.data = _select(tensor.data, axis, keep)
        tensor.grad = None if grad is None else _select(grad, axis, keep)


def _select(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    chosen = tensor.index_select(axis, keep)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return chosen.contiguous(memory_format=torch.channels_last)
    return chosen


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    folder, _, attribute = name.rpartition(".")
    return model.get_submodule(folder), attribute


def describe_size(module: nn.Module) -> None:
    """Bring the numbers that a layer shows and computes with to the shape of its weight."""
    if isinstance(module, nn.Linear | MaskedLinear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d | MaskedConv2d):
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(next(chain(module.parameters(), module.buffers())))
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


__all__ = ["ChannelGroup", "ChannelPruner", "ChannelReport"]
