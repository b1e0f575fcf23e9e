"""The networks that the recipes name, and any other by `package.module:function` or `file.py:function`."""

import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from torch import nn

from imgopt_fast.models.mobilenet import mobilenetv2
from imgopt_fast.models.resnet import resnet8, resnet18, resnet20, resnet50
from imgopt_fast.models.vit import vit

__all__ = [
    "MODELS",
    "absolute_file",
    "create_model",
    "mobilenetv2",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet50",
    "vit",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "mobilenetv2": mobilenetv2,
    "vit": vit,
}
TIMM = "timm/"  # what the names of timm's networks begin with
FILE = ".py"  # what the name of a file ends with, before the colon


def create_model(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """The network `name`: one of MODELS, `timm/NAME`, or a function as `package.module:function` or `file.py:function`.

    The function is called as `function(num_classes=N, in_channels=N)` and returns an nn.Module that takes float images
    (N, C, H, W) and gives logits (N, num_classes). Raises ValueError when there is no such network.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, in_channels=in_channels)
    if name.startswith(TIMM):
        return _timm(name.removeprefix(TIMM), num_classes, in_channels)
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise ValueError(
            f"model: expected one of {', '.join(MODELS)}, timm/NAME, package.module:function or file.py:function, "
            f"got {name!r}"
        )
    try:
        create = getattr(_from_file(module) if module.endswith(FILE) else import_module(module), function)
    except Exception as error:  # a module of the user's own may raise anything
        raise ValueError(f"model: cannot import {name!r}: {_in_a_line(error)}") from error
    _check_signature(name, create)
    try:
        model = create(num_classes=num_classes, in_channels=in_channels)
    except Exception as error:
        raise ValueError(f"model: {name!r}: {_in_a_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def absolute_file(name: str) -> str:
    """`name`; that of a file in a form that is found from any other folder."""
    return os.path.abspath(name) if name.rpartition(":")[0].endswith(FILE) else name


@cache
def _from_file(path: str) -> ModuleType:
    """The module in the file `path`, which can import its neighbours; its own name may be another module's."""
    spec = spec_from_file_location(f"_file_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    return module


def _check_signature(name: str, create: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(create)
    except (TypeError, ValueError) as error:  # no function, or one that does not say
        if callable(create):
            return
        raise ValueError(f"model: {name!r} is no function but of type {type(create).__name__}") from error
    try:
        signature.bind(num_classes=0, in_channels=0)
    except TypeError as error:
        function = f"{name.rpartition(':')[2]}{signature.replace(return_annotation=inspect.Signature.empty)}"
        raise ValueError(
            f"model: {name!r} is called with num_classes=N and in_channels=N, which {function} does not take: {error}"
        ) from error


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


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
