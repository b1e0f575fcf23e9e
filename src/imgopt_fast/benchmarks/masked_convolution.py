"""masked_conv2d on pruned convolutions of ResNet-50, against torch's dense ones: inference, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch.nn import functional as F

from imgopt_fast.benchmarks.case import Case, Runner, Work
from imgopt_fast.benchmarks.masks import FLOAT32, random_mask
from imgopt_fast.ops.masked_matmul import mask_layout, masked_conv2d, pack_masked_weight


@dataclass(eq=False)
class ConvolutionCase(Case):
    """A pruned convolution of ResNet-50 at 90 %, batch 8, channels_last: inference with packed weights."""

    subject: ClassVar[str] = "masked_matmul"
    channels: int
    filters: int
    kernel: int
    side: int
    quick: bool = False
    batch: int = 8
    sparsity: float = 0.9

    @property
    def name(self) -> str:  # type: ignore[override]
        return (
            f"convolution 90% {self.kernel}x{self.kernel} {self.channels}->{self.filters} @{self.side} N={self.batch}"
        )

    @cached_property
    def input(self) -> torch.Tensor:
        shape = (self.batch, self.channels, self.side, self.side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return x.contiguous(memory_format=torch.channels_last)

    @cached_property
    def weight(self) -> torch.Tensor:
        shape = (self.filters, self.channels, self.kernel, self.kernel)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2))

    @cached_property
    def mask(self) -> torch.Tensor:
        return random_mask(self.filters, self.channels * self.kernel**2, self.sparsity).view(self.weight.shape)

    def ours(self) -> Runner:
        x, packed, padding = self.input, pack_masked_weight(self.weight, self.mask), self.kernel // 2
        return Runner(lambda: masked_conv2d(x, packed, padding=padding))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch}

    def with_torch(self) -> Runner:
        weight = (self.weight * self.mask).contiguous(memory_format=torch.channels_last)
        x, padding = self.input, self.kernel // 2
        return Runner(lambda: F.conv2d(x, weight, padding=padding), FLOAT32, goal=2.5)

    def work(self) -> Work:
        # A multiply-add per kept weight and output pixel (the border's fewer taps are not worth counting).
        pixels, kept = self.batch * self.side**2, int(self.mask.sum())
        return Work(
            flops=2.0 * kept * pixels,
            bytes_read=4.0 * (kept + pixels * self.channels),
            bytes_written=4.0 * pixels * self.filters,
        )


@dataclass(eq=False)
class ConvolutionStepCase(ConvolutionCase):
    """Forward and backward of such a layer, with a dense weight and a layout, as in training."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{super().name}, forward and backward"

    def ours(self) -> Runner:
        layout, padding = mask_layout(self.mask), self.kernel // 2
        return self.gradients(lambda x, w: masked_conv2d(x, w, layout, padding=padding), None)

    def with_torch(self) -> Runner:
        mask, padding = self.mask.float(), self.kernel // 2
        return self.gradients(lambda x, w: F.conv2d(x, w * mask, padding=padding), 2.0)

    def gradients(self, forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], goal: float | None) -> Runner:
        x = self.input.clone().requires_grad_()
        weight = (self.weight * self.mask).contiguous(memory_format=torch.channels_last).requires_grad_()

        def call() -> tuple[torch.Tensor, ...]:
            output = forward(x, weight)
            return torch.autograd.grad(output, (x, weight), output.detach())

        def result(grads: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return torch.cat([(grad / grad.abs().max()).flatten() for grad in grads])

        return Runner(call, FLOAT32, result, goal)

    def work(self) -> Work:
        # Three products instead of one; the output goes and its gradient comes, the input's gradient goes.
        forward = super().work()
        pixels = self.batch * self.side**2
        moved = 4.0 * pixels * (self.channels + self.filters)
        return Work(3 * forward.flops, bytes_read=forward.bytes_read + moved, bytes_written=moved)


CASES: list[Case] = [
    ConvolutionCase(256, 64, 1, 56),
    ConvolutionCase(1024, 256, 1, 14),
    ConvolutionCase(64, 64, 3, 56),
    ConvolutionCase(256, 256, 3, 14),
    ConvolutionStepCase(1024, 256, 1, 14),
    ConvolutionStepCase(256, 256, 3, 14),
]
