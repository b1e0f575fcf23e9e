"""`prune`: masks for the layers of a model, or channels taken out of it, and what drives them through training."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from imgopt_fast.compress.prune.channels import ChannelPruner
from imgopt_fast.compress.prune.config import PruneConfig
from imgopt_fast.compress.prune.pruner import Pruner
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear, pads_alike
from imgopt_fast.nn.replace import replace_module

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
    an optimizer made before goes on to work; hooks go with them. Layers that share a weight share its mask. A mask that
    is there already stays, and more weights go. Channels (structure "channels"): the layers shrink where they are, with
    the batch norms and the layers that read them; Parameters keep their identity and change their shape. An
    `optimizer` that is given keeps no memory of what is pruned.

    Args:
        example: a batch of images as the model takes them, for structure "channels" only, which traces the model.

    Raises ValueError if a name in `config.exclude` does not exist, where there is nothing to prune, and, naming the
    layer and the way out, where a layer cannot take a mask or channels cannot be removed.
    """
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config: expected a PruneConfig, got {type(config).__name__}")
    names = {name for name, _ in model.named_modules()}
    for excluded in config.exclude:
        if excluded not in names:
            raise ValueError(f"exclude: the model has no module named {excluded!r}")
    if config.channels:
        if example is None:
            raise ValueError("example: expected a batch of images, which structure 'channels' traces the model with")
        return ChannelPruner(model, config, example, optimizer)
    layers = dict(prunable_layers(model, config.exclude))
    _check(model, layers)
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            replace_module(model, layer, MaskedLinear.from_dense(layer))
        elif isinstance(layer, nn.Conv2d):
            replace_module(model, layer, MaskedConv2d.from_dense(layer))
    return Pruner(model, config, optimizer)


def _check(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Whether each of `layers`, those of `model` that take a mask, is ready for one."""
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(f"{name}: it has no weight yet; call the model on a batch first")
    if not layers:
        raise ValueError(
            "model: nothing takes a mask: no nn.Linear, and no nn.Conv2d that sees more than "
            f"{FEWEST_CHANNELS} channels, is not depthwise and pads with zeros, but for what `exclude` names"
        )
    if "" in layers:
        raise ValueError("model: expected a module that holds layers, got a layer itself; wrap it in nn.Sequential")
    for name, layer in layers.items():
        if "weight" not in dict(layer.named_parameters(recurse=False)):
            raise ValueError(
                f"{name}: its weight is computed anew in every forward; make it a parameter again, as "
                f"torch.nn.utils.prune.remove(layer, 'weight') does, or leave it out with exclude=({name!r},)"
            )


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
    return conv.in_channels > FEWEST_CHANNELS and not depthwise and pads_alike(conv)
