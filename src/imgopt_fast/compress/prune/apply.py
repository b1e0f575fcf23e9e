"""`prune`: masks for the layers of a model, or channels taken out of it, and what drives them through training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from imgopt_fast.compress.prune.channels import ChannelPruner
from imgopt_fast.compress.prune.config import PruneConfig
from imgopt_fast.compress.prune.pruner import Pruner
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear

FEWEST_CHANNELS = 4  # convolutions that see an image: few weights, and every later layer depends on them


def prune(
    model: nn.Module,
    config: PruneConfig,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    example: Any = None,
) -> Pruner:
    """Prune `model`, in place, and return what drives the schedule: call its `step()` after every `optimizer.step()`.

    Masks: each `nn.Linear` and `nn.Conv2d` becomes a `MaskedLinear` or `MaskedConv2d` that shares its Parameters, so
    an optimizer made before goes on to work. Channels (structure "channels"): the layers shrink where they are, with
    the batch norms and the layers that read them; Parameters keep their identity and change their shape. An
    `optimizer` that is given keeps no memory of what is pruned.

    Args:
        example: a batch of images as the model takes them, for structure "channels" only, which traces the model.

    Raises ValueError if a name in `config.exclude` does not exist, or, naming the layer and the way out, where
    channels cannot be removed.
    """
    names = {name for name, _ in model.named_modules()}
    for excluded in config.exclude:
        if excluded not in names:
            raise ValueError(f"exclude: the model has no module named {excluded!r}")
    if config.channels:
        if example is None:
            raise ValueError("example: expected a batch of images, which structure 'channels' traces the model with")
        return ChannelPruner(model, config, example, optimizer)
    for name, layer in list(prunable_layers(model, config.exclude)):
        if isinstance(layer, MaskedLinear | MaskedConv2d):
            continue
        masked = MaskedLinear.from_dense(layer) if isinstance(layer, nn.Linear) else MaskedConv2d.from_dense(layer)
        if not name:
            raise ValueError("model: expected a module that holds layers, got a layer itself; wrap it in nn.Sequential")
        model.set_submodule(name, masked)
    return Pruner(model, config, optimizer)


def prunable_layers(
    model: nn.Module, exclude: tuple[str, ...] = ()
) -> Iterator[tuple[str, nn.Linear | nn.Conv2d | MaskedLinear | MaskedConv2d]]:
    """Names and layers that take a mask, or have one."""
    for name, module in model.named_modules():
        if any(name == excluded or name.startswith(excluded + ".") for excluded in exclude):
            continue
        if (
            isinstance(module, MaskedLinear | MaskedConv2d)
            or type(module) is nn.Linear
            or (type(module) is nn.Conv2d and _prunable(module))
        ):
            yield name, module


def _prunable(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups > 1 and conv.groups == conv.in_channels
    return conv.in_channels > FEWEST_CHANNELS and not depthwise and conv.padding_mode == "zeros"
