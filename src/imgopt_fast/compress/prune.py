"""Pruning during training: layers get masks, a schedule tightens them, and pruned weights stay exactly zero.

    pruner = prune(model, PruneConfig(sparsity=0.9, start_step=100, end_step=2000, update_every=50), optimizer)
    for batch in loader:
        ...
        optimizer.step()
        pruner.step()

The sparsity follows the cubic ramp of Zhu and Gupta, "To prune, or not to prune" (2017). An optimizer that is given
keeps no memory of pruned weights: momentum and the Adam moments are zeroed with them, so that neither they nor weight
decay can bring one back between two steps.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear

MaskedLayer = MaskedLinear | MaskedConv2d
_FEWEST_CHANNELS = 4  # convolutions that see an image: few weights, and every later layer depends on them


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, how far and when.

    Args:
        sparsity: share of the weights of the pruned layers to remove in the end, 0 to 1.
        method: "magnitude" removes the smallest absolute values, "random" any (seeded by `seed`).
        scope: "layer" prunes each layer alike, "global" ranks the weights of all layers together.
        structure: "unstructured"; "RxC", e.g. "4x1": blocks of R outputs by C inputs stand or fall together; "N:M",
            e.g. "2:4": at most N of M neighbouring inputs remain (`sparsity` is then 1 - N/M and unused).
        start_step: steps before the first mask; 0: `prune` itself sets it.
        end_step: steps at which `sparsity` is reached; at most start_step: one shot at start_step.
        update_every: steps between two masks of the ramp.
        exclude: names of layers (or of modules above them) that stay dense. The first convolution (at most 4 input
            channels) and depthwise convolutions stay dense in any case.

    Raises ValueError for values outside of these.
    """

    sparsity: float = 0.8
    method: Literal["magnitude", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    structure: str = "unstructured"
    start_step: int = 0
    end_step: int = 0
    update_every: int = 1
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a share from 0 to 1, got {self.sparsity}")
        if self.method not in ("magnitude", "random"):
            raise ValueError(f"method: expected 'magnitude' or 'random', got {self.method!r}")
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope: expected 'layer' or 'global', got {self.scope!r}")
        if self.update_every < 1 or self.start_step < 0 or self.end_step < 0:
            raise ValueError(
                "start_step, end_step, update_every: expected at least 0, 0 and 1, "
                f"got {self.start_step}, {self.end_step} and {self.update_every}"
            )
        _parse_structure(self.structure)

    def sparsity_at(self, step: int) -> float:
        """The sparsity that the ramp has reached after `step` steps."""
        if step < self.start_step:
            return 0.0
        if step >= self.end_step:
            return self.sparsity
        progress = (step - self.start_step) / (self.end_step - self.start_step)
        return self.sparsity * (1 - (1 - progress) ** 3)


class LayerReport(NamedTuple):
    """One pruned layer: its name, the shape of its weight, the share of weights left, and what computes it."""

    name: str
    shape: tuple[int, ...]
    density: float
    kernel: str


class Pruner:
    """Drives the masks of a model that `prune` has prepared. Call `step()` after every `optimizer.step()`."""

    def __init__(self, model: nn.Module, config: PruneConfig, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.config = config
        self.optimizer = optimizer
        self.layers: dict[str, MaskedLayer] = dict(masked_layers(model))
        self.steps = 0
        if config.start_step == 0 and (sparsity := config.sparsity_at(0)) > 0:
            self._update(sparsity)

    @property
    def sparsity(self) -> float:
        """Share of the weights of the pruned layers that are removed now."""
        total = sum(layer.weight.numel() for layer in self.layers.values())
        kept = sum(int(layer.weight_mask.sum()) for layer in self.layers.values())
        return 1 - kept / total if total else 0.0

    def step(self) -> None:
        """Advance the ramp by one step: tighten the masks when they are due, and zero what is pruned."""
        self.steps += 1
        if self._due():
            self._update(self.config.sparsity_at(self.steps))
        else:
            self._zero()

    def report(self) -> list[LayerReport]:
        """A line per layer."""
        return [
            LayerReport(
                name, tuple(layer.weight.shape), layer.density(), f"row quads, blocks of {layer.layout().block}"
            )
            for name, layer in self.layers.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule; the masks are in the model's state_dict."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the schedule where `state` left it; load the model's state_dict as well."""
        self.steps = int(state["steps"])

    def _due(self) -> bool:
        config, last = self.config, max(self.config.start_step, self.config.end_step)
        if not config.start_step <= self.steps <= last:
            return False
        return self.steps == last or (self.steps - config.start_step) % config.update_every == 0

    def _update(self, sparsity: float) -> None:
        scores = {name: self._scores(name, layer) for name, layer in self.layers.items()}
        if self.config.scope == "global" and scores and ":" not in self.config.structure:
            kept = _keep(torch.cat([score.flatten() for score in scores.values()]), sparsity)
            masks = dict(zip(scores, kept.split([score.numel() for score in scores.values()]), strict=True))
        elif ":" in self.config.structure:
            masks = {name: _keep_n_of_m(score, self.config.structure) for name, score in scores.items()}
        else:
            masks = {name: _keep(score.flatten(), sparsity) for name, score in scores.items()}
        for name, layer in self.layers.items():
            layer.set_mask(self._spread(masks[name].view(scores[name].shape), layer.weight))
        self._zero()

    def _scores(self, name: str, layer: MaskedLayer) -> Tensor:
        """(O', K'): what each block of the structure is worth, pruned ones the least. K runs over taps, then inputs."""
        if self.config.method == "random":
            generator = torch.Generator().manual_seed(self.config.seed + list(self.layers).index(name))
            score = torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)
        else:
            score = layer.weight.detach().abs().float()
        score = torch.where(layer.weight_mask, score, -1)
        score = _as_matrix(score)
        rows, columns = _block_shape(self.config.structure)
        out, inputs = score.shape
        padded = nn.functional.pad(score, (0, -inputs % columns, 0, -out % rows))
        return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).sum((1, 3))

    def _spread(self, kept: Tensor, weight: Tensor) -> Tensor:
        """The mask of the weight's shape from one entry per block."""
        rows, columns = _block_shape(self.config.structure)
        mask = kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        matrix = _as_matrix(weight)
        mask = mask[: matrix.shape[0], : matrix.shape[1]]
        if weight.dim() == 2:
            return mask
        out, inputs, height, width = weight.shape
        return mask.reshape(out, height, width, inputs).permute(0, 3, 1, 2)

    @torch.no_grad()
    def _zero(self) -> None:
        for layer in self.layers.values():
            layer.weight.mul_(layer.weight_mask)
            state = self.optimizer.state.get(layer.weight, {}) if self.optimizer is not None else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.mul_(layer.weight_mask)


def prune(model: nn.Module, config: PruneConfig, optimizer: torch.optim.Optimizer | None = None) -> Pruner:
    """Give the linears and convolutions of `model` masks, in place, and return what drives them.

    Each `nn.Linear` and `nn.Conv2d` becomes a `MaskedLinear` or `MaskedConv2d` that shares its Parameters, so an
    optimizer made before goes on to work. Raises ValueError if a name in `config.exclude` does not exist.
    """
    names = {name for name, _ in model.named_modules()}
    for excluded in config.exclude:
        if excluded not in names:
            raise ValueError(f"exclude: the model has no module named {excluded!r}")
    for name, module in list(model.named_modules()):
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if any(path == excluded or path.startswith(excluded + ".") for excluded in config.exclude):
                continue
            if type(child) is nn.Linear:
                setattr(module, child_name, MaskedLinear.from_dense(child))
            elif type(child) is nn.Conv2d and _prunable(child):
                setattr(module, child_name, MaskedConv2d.from_dense(child))
    return Pruner(model, config, optimizer)


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Names and layers of `model` that have masks."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module


def _prunable(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    return conv.in_channels > _FEWEST_CHANNELS and not depthwise and conv.padding_mode == "zeros"


def _parse_structure(structure: str) -> tuple[int, int]:
    if structure == "unstructured":
        return (1, 1)
    match = re.fullmatch(r"(\d+)([x:])(\d+)", structure)
    if match is None:
        raise ValueError(f"structure: expected 'unstructured', 'RxC' or 'N:M', got {structure!r}")
    first, second = int(match[1]), int(match[3])
    if min(first, second) < 1 or (match[2] == ":" and first > second):
        raise ValueError(f"structure: expected positive sizes, and N at most M, got {structure!r}")
    return first, second


def _block_shape(structure: str) -> tuple[int, int]:
    return (1, 1) if ":" in structure else _parse_structure(structure)


def _as_matrix(weight: Tensor) -> Tensor:
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def _keep(score: Tensor, sparsity: float) -> Tensor:
    """bool: all but the round(sparsity * n) smallest of a flat score; ties go to the earlier ones being kept."""
    kept = score.numel() - round(sparsity * score.numel())
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask[torch.sort(score, descending=True, stable=True).indices[:kept]] = True
    return mask


def _keep_n_of_m(score: Tensor, structure: str) -> Tensor:
    """bool: the N largest of every M neighbours of a row (O, K)."""
    n, m = _parse_structure(structure)
    padded = nn.functional.pad(score, (0, -score.shape[1] % m), value=-2).unflatten(1, (-1, m))
    kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(n, 2).indices, True)
    return kept.flatten(1)[:, : score.shape[1]]
