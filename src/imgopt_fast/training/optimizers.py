"""From gradients to the next weights: optimizer, schedule, and what follows each step.

Beside torch's optimizers and the one for pruned layers, three that have no ready-made form: `gd`, gradient descent over
the whole training set, whose gradient is the exact sum over all batches; `--l1`, a proximal step after the optimizer's
own, which reaches exact zeros where a subgradient oscillates around them (Beck and Teboulle 2009); and weights that
stay zero where they are zero.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imgopt_fast.compress import MaskedSGD, Pruner
from imgopt_fast.compress.prune import masked_layers
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.stages import Stage

ZEROS_KEPT_FROM = 0.3  # share of zeros from which a weight counts as pruned


class Updates:
    """Turns the gradients of `model` and of `helpers` (modules of the loss) into new weights, once per update."""

    def __init__(
        self,
        model: nn.Module,
        helpers: nn.Module,
        config: TrainConfig,
        stage: Stage,
        updates_per_epoch: int,
        process: Process,
        pruner: Pruner | None = None,
    ) -> None:
        self.model, self.config, self.process, self.pruner = model, config, process, pruner
        self.clip_grad = stage.clip_grad if config.clip_grad is None else config.clip_grad
        self.optimizer = make_optimizer(model, helpers, config, stage.lr)
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate(step, stage, updates_per_epoch, config))
        device = next(model.parameters()).device
        half = stage.amp and config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.averaged = Averaged(model, config.model_ema_decay) if config.model_ema_decay > 0 else None
        self.zeros = Zeros(model) if stage.keep_zeros else None
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if pruner is not None:
            pruner.optimizer = self.optimizer  # whose momentum must forget the pruned weights

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.averaged.module if self.averaged is not None else self.model

    def parts(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""
        parts = {
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }
        optional = {"pruner": self.pruner, "averaged": self.averaged}
        return parts | {name: part for name, part in optional.items() if part is not None}

    def backward(self, loss: Tensor, share: float) -> None:
        """Add the gradients of `loss`, which is `share` of the update's."""
        self.scaler.scale(loss * share).backward()

    def apply(self) -> None:
        """The gradients move the weights, and are gone."""
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        torch.autograd.graph.increment_version(self.parameters)  # which fused optimizers forget
        if self.config.l1 > 0:
            proximal_l1(self.optimizer, self.config.l1)
        self.optimizer.zero_grad()
        if self.zeros is not None:
            self.zeros.step()

    def step(self, flags: Tensor, *, applied: bool = False) -> None:
        """One update, and what follows it. `flags` is summed over the processes together with the gradients.

        `applied`: the weights have moved already.
        """
        if not applied:
            self._sum(flags)
            self.apply()
        self.schedule.step()
        if self.pruner is not None:
            self.pruner.step()
        if self.averaged is not None:
            self.averaged.update(self.model)

    def finish(self) -> None:
        """The averaged weights, where there are such, become the network's."""
        if self.averaged is not None:
            self.model.load_state_dict(self.averaged.module.state_dict())

    def _sum(self, flags: Tensor) -> None:
        if self.process.world > 1:
            statistics = [b for b in self.model.buffers() if b.is_floating_point()]  # the mean of all, for batch norm
            for buffer in statistics:
                buffer.div_(self.process.world)
            self.process.sum([*(p.grad for p in self.parameters if p.grad is not None), *statistics, flags])


def make_optimizer(model: nn.Module, helpers: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """Biases and batch norm's parameters do not decay; frozen parameters are left out.

    As few groups as there are different rates and decays: each costs a step some launches of its own.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for depth, modules in enumerate(layers := layer_groups(model)):
        rate = lr * config.layer_decay ** (len(layers) - 1 - depth)
        _collect(members, [p for m in modules for p in m.parameters(recurse=False)], config, rate)
    _collect(members, helpers.parameters(), config, lr)
    groups = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in members.items()]
    on_gpu = next(model.parameters()).is_cuda
    fused = True  # all parameters in one call: of ResNet-20 0.3 ms a step in place of 0.9, and one launch on a GPU
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr, fused=fused, capturable=on_gpu)
    if config.opt == "adam":
        return torch.optim.Adam(groups, lr, fused=fused, capturable=on_gpu)
    if not on_gpu and next(masked_layers(model), None) is not None:  # half the time from layers of 128 channels on
        return MaskedSGD(groups, lr, config.momentum, nesterov=config.momentum > 0, model=model)
    return torch.optim.SGD(groups, lr, config.momentum, nesterov=config.momentum > 0, fused=fused)


def layer_groups(model: nn.Module) -> list[list[nn.Module]]:
    """The modules with parameters of their own, in order, those of one block (`layer1.0`) together."""
    blocks: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            path = name.split(".")
            numbered = next((i for i, part in enumerate(path) if part.isdigit()), 0)
            blocks.setdefault(".".join(path[: numbered + 1]), []).append(module)
    return list(blocks.values())


def _collect(
    members: dict[tuple[float, float], list[nn.Parameter]],
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    rate: float,
) -> None:
    """Add the parameters that learn to `members`, by rate and weight decay."""
    for parameter in parameters:
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            members.setdefault((rate, decay), []).append(parameter)


def learning_rate(step: int, stage: Stage, updates_per_epoch: int, config: TrainConfig) -> float:
    """Share of the stage's highest rate at `step`: a linear rise, then the schedule down."""
    warmup, total = stage.warmup_epochs * updates_per_epoch, stage.epochs * updates_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.sched == "step":
        return config.decay_rate ** math.floor(step / (config.decay_epochs * updates_per_epoch))
    progress = (step - warmup) / max(1.0, total - warmup)
    return 1 - progress if config.sched == "linear" else (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def proximal_l1(optimizer: torch.optim.Optimizer, strength: float) -> None:
    """Move every weight with decay by lr · strength towards zero and stop there: the proximal operator of the L1 norm.

    The minimum of loss + strength · ‖w‖₁ has exact zeros, and so have the iterates.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.ndim > 1:
                weight.copy_(torch.nn.functional.softshrink(weight, group["lr"] * strength))


class Averaged(AveragedModel):
    """The exponential moving average of the weights; statistics and masks are those of the network itself."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)
        for _, layer in masked_layers(self.module):
            layer.weight.mul_(layer.weight_mask)


class Zeros:
    """Weights that a stage begins with as zeros, and that stay zeros."""

    def __init__(self, model: nn.Module) -> None:
        weights = [p for p in model.parameters() if p.ndim in (2, 4)]
        self._zeros = [(w, w.detach() == 0) for w in weights if (w == 0).float().mean() >= ZEROS_KEPT_FROM]

    @torch.no_grad()
    def step(self) -> None:
        for weight, zeros in self._zeros:
            weight.masked_fill_(zeros, 0)
