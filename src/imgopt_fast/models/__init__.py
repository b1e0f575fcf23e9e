"""The networks that the recipes name, and any other by `package.module:function`."""

from collections.abc import Callable
from importlib import import_module

from torch import nn

from imgopt_fast.models.mobilenet import mobilenetv2
from imgopt_fast.models.resnet import resnet8, resnet18, resnet20, resnet50
from imgopt_fast.models.vit import vit

__all__ = ["MODELS", "create_model", "mobilenetv2", "resnet8", "resnet18", "resnet20", "resnet50", "vit"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "vit": vit,
}
TIMM = "timm/"  # what the names of timm's networks begin with


def create_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """The network `name`: one of MODELS, `timm/NAME`, or `package.module:function`, called with `num_classes` and
    `in_channels`.

    Raises ValueError when there is no such network.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), num_classes, in_channels)
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"model: expected one of {', '.join(MODELS)}, timm/NAME or package.module:function, got {name!r}"
        )
    try:
        create = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: cannot import {name!r}: {error}") from error
    try:
        model = create(num_classes=num_classes, in_channels=in_channels)
    except Exception as error:  # a function of the user's own may raise anything
        raise ValueError(f"model: {name!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        raise ValueError(f"model: timm/{name} needs timm, which cannot be imported here: {error}") from error
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model: timm/{name}: {' '.join(str(error).split())}") from error
    return model
