"""The multiply-adds that convolutions and linear layers cannot do without, for the floors of the benchmarks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def taps_inside(size: Sequence[int], kernel: int, stride: int, padding: int) -> int:
    """Taps of one input and one output channel that meet an image of `size`, not its padding, whose products are 0."""
    ones = torch.ones(1, 1, *size)
    return int(F.conv2d(ones, torch.ones(1, 1, kernel, kernel), stride=stride, padding=padding).sum())


def multiply_adds(model: nn.Module, image: torch.Tensor) -> int:
    """Of all convolutions (square kernels) and linear layers of `model` for `image`, of shape (1, C, H, W)."""
    count = 0

    def add(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal count
        assert isinstance(module.weight, torch.Tensor)
        taps = 1
        if isinstance(module, nn.Conv2d):
            assert isinstance(module.padding, tuple)
            taps = taps_inside(inputs[0].shape[2:], module.kernel_size[0], module.stride[0], module.padding[0])
        count += taps * module.weight.shape[0] * module.weight.shape[1]

    layers = layers_of(model)
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model.eval()(image)
    for hook in hooks:
        hook.remove()
    return count


def layers_of(model: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
