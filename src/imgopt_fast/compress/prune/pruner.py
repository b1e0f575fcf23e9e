"""What drives the masks of a model through training: when they change, what they keep, and that the rest stays zero."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from imgopt_fast.compress.masked_sgd import MaskedSGD
from imgopt_fast.compress.prune.config import PruneConfig
from imgopt_fast.compress.prune.report import PruningReport, describe, measure
from imgopt_fast.compress.prune.structure import block_scores, keep_best, keep_count, keep_n_of_m, spread
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear

MaskedLayer = MaskedLinear | MaskedConv2d


class Pruner:
    """Drives the masks of a model that `prune` has prepared. Call `step()` after every `optimizer.step()`.

    Masks depend on weights, gradients, the configuration and the number of steps alone: processes that train the same
    model on gradients they have averaged, as DistributedDataParallel does, keep the same masks.
    """

    def __init__(self, model: nn.Module, config: PruneConfig, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.config = config
        self.optimizer = optimizer
        self.layers: dict[str, MaskedLayer] = dict(masked_layers(model))
        self.steps = 0
        if config.start_step == 0 and config.sparsity > 0 and (sparsity := config.sparsity_at(0)) > 0:
            self._prune_to(sparsity)
        self._announce()

    @property
    def sparsity(self) -> float:
        """Share of the weights of the pruned layers that are removed now."""
        layers = [layers[0] for layers in self._by_weight().values()]
        total = sum(layer.weight.numel() for layer in layers)
        kept = sum(int(layer.weight_mask.sum()) for layer in layers)
        return 1 - kept / total if total else 0.0

    def step(self) -> None:
        """Advance by one step: change the masks when they are due, and zero what is pruned."""
        self.steps += 1
        config = self.config
        due = config.due_at(self.steps)
        if due and (config.regrow is None or self.steps == config.start_step):
            self._prune_to(config.sparsity_at(self.steps))
        elif due and self.steps < config.end_step:
            self._move(config.moving_at(self.steps))
        else:
            self._zero()
        self._announce()

    def report(self, example: Any = None) -> PruningReport:
        """A line per layer; print it.

        With `example`, a batch as the model takes it, each layer is also timed on its own input against torch's dense
        one: time, and the density below which it is faster (its own structure, uniformly random masks). That takes
        about a second per layer and leaves the model as it is.
        """
        layers = {name: (layer, self.config.structure) for name, layer in self.layers.items()}
        return describe(layers) if example is None else measure(self.model, layers, example)

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule; the masks are in the model's state_dict."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the schedule where `state` left it; load the model's state_dict as well."""
        self.steps = int(state["steps"])
        self._announce()

    def _announce(self) -> None:
        """Ask for dense gradients in the step whose update will regrow by them."""
        config, next_step = self.config, self.steps + 1
        grows = config.regrow == "gradient" and config.start_step < next_step < config.end_step
        for layer in self.layers.values():
            layer.dense_gradient = grows and config.due_at(next_step)

    def _prune_to(self, sparsity: float) -> None:
        """Masks of this sparsity; what is pruned already stays so."""
        structure, by_weight = self.config.structure, self._by_weight()
        scores = {name: self._worth(name, layers[0]) for name, layers in by_weight.items()}
        if self.config.n_of_m:
            kept = {name: keep_n_of_m(score, structure) for name, score in scores.items()}
        elif self.config.scope == "global" and scores:
            flat = keep_best(torch.cat([score.flatten() for score in scores.values()]), sparsity)
            kept = dict(zip(scores, flat.split([score.numel() for score in scores.values()]), strict=True))
        else:
            kept = {name: keep_best(score.flatten(), sparsity) for name, score in scores.items()}
        for name, layers in by_weight.items():
            mask = spread(kept[name].view(scores[name].shape), structure, layers[0].weight.shape)
            mask = mask & layers[0].weight_mask
            for layer in layers:
                layer.set_mask(mask)
        self._zero()

    @torch.no_grad()
    def _move(self, share: float) -> None:
        """Drop this share of each layer's kept blocks, the smallest, and regrow as many of those that were absent."""
        structure = self.config.structure
        self._zero()  # the step of the dense gradient moved what is about to grow
        for name, layers in self._by_weight().items():
            layer = layers[0]
            present = block_scores(layer.weight_mask.float(), structure) > 0
            kept = int(present.sum())
            count = min(round(share * kept), present.numel() - kept)
            size = block_scores(layer.weight.abs().float(), structure).masked_fill(~present, -1).flatten()
            stays = keep_count(size, kept - count)
            growth = self._growth(name, layer).masked_fill(present, -1).flatten()
            grows = keep_count(growth, count)
            mask = spread((stays | grows).view(present.shape), structure, layer.weight.shape)
            for each in layers:
                each.set_mask(mask)
        self._zero()

    def _by_weight(self) -> dict[str, list[MaskedLayer]]:
        """The layers of each weight, which share its mask too, by the name of the first."""
        names, found = dict[Tensor, str](), dict[str, list[MaskedLayer]]()
        for name, layer in self.layers.items():
            found.setdefault(names.setdefault(layer.weight, name), []).append(layer)
        return found

    def _worth(self, name: str, layer: MaskedLayer) -> Tensor:
        """What each block is worth; those that are pruned the least."""
        score = self._random(name, layer) if self.config.method == "random" else layer.weight.detach().abs().float()
        return block_scores(torch.where(layer.weight_mask, score, -1), self.config.structure)

    def _growth(self, name: str, layer: MaskedLayer) -> Tensor:
        """What each absent block would be worth."""
        if self.config.regrow == "random":
            return block_scores(self._random(name, layer, self.steps), self.config.structure)
        if layer.weight.grad is None:
            raise RuntimeError(
                f"{name}: no gradient to regrow by; call pruner.step() after optimizer.step() and before zero_grad()"
            )
        return block_scores(layer.weight.grad.abs().float(), self.config.structure)

    def _random(self, name: str, layer: MaskedLayer, step: int = 0) -> Tensor:
        """The same numbers for the same seed, layer and step; a ramp keeps its order from update to update."""
        seed = (self.config.seed + step * 1_000_003) * 65_537 + list(self.layers).index(name)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)

    @torch.no_grad()
    def _zero(self) -> None:
        """No weight and no memory of the optimizer where the mask is not set; MaskedSGD leaves none there."""
        groups = self.optimizer.param_groups if isinstance(self.optimizer, MaskedSGD) else []
        left_alone = {parameter for group in groups for parameter in group["params"]}
        for layer, *_ in self._by_weight().values():
            if layer.weight in left_alone:
                continue
            absent = ~layer.weight_mask
            layer.weight.masked_fill_(absent, 0)
            state = self.optimizer.state.get(layer.weight, {}) if self.optimizer is not None else {}
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                    value.masked_fill_(absent, 0)


def masked_layers(model: nn.Module) -> Iterator[tuple[str, MaskedLayer]]:
    """Names and layers of `model` that have masks."""
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            yield name, module
