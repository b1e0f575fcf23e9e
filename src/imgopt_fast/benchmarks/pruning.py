"""Pruned networks at work: a training step, the optimizer by itself, and inference of a pruned ResNet-18.

What a user of torch does instead is on the other side: dense layers whose weight is multiplied by the mask in every
step, so that pruned weights stay zero, and for inference the same weights in dense layers. The kernels by themselves
are in masked_matmul.py, networks of CIFAR's size in pruned_cifar.py.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from imgopt_fast.benchmarks import pruned_cifar
from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work, on_one_thread
from imgopt_fast.benchmarks.masks import FLOAT32, random_mask
from imgopt_fast.benchmarks.networks import Int8Case, folded_model, size_of
from imgopt_fast.compress import MaskedSGD, pack
from imgopt_fast.nn import MaskedLinear
from imgopt_fast.ops.masked_sgd import kept_bits, masked_sgd

RATE, MOMENTUM = 1e-3, 0.9
# Two cores of a shared Zen 5 machine: writing 64 MB takes 1.94 ms with one thread and 1.59 with two, reading 128 MB
# 3.88 and 3.20; forward and input gradient of 4096 x 4096 at 90 % are 1.50 and 1.62 times as fast with two.
TWO_THREADS_NOTE = (
    "weights, gradients and the optimizer's pass come from memory, whose rate grows 1.2 times with the second core"
)


@dataclass(eq=False)
class StepCase(Case):
    """Forward, backward and SGD with momentum of an MLP 4096-4096-1000 at batch 256, 90 % of its weights pruned."""

    subject: ClassVar[str] = "pruning"
    threads: int | None = None
    quick: bool = False
    batch: int = 256
    widths: tuple[int, ...] = (4096, 4096, 1000)
    sparsity: float = 0.9

    @property
    def name(self) -> str:  # type: ignore[override]
        widths = "-".join(map(str, self.widths))
        return f"training step {self.sparsity:.0%} MLP {widths}" + (", two threads" if self.threads == 2 else "")

    @property
    def note(self) -> str | None:  # type: ignore[override]
        return TWO_THREADS_NOTE if self.threads == 2 else None

    @cached_property
    def input(self) -> torch.Tensor:
        return torch.randn(self.batch, self.widths[0], generator=torch.Generator().manual_seed(1))

    @cached_property
    def label(self) -> torch.Tensor:
        return torch.randint(0, self.widths[-1], (self.batch,), generator=torch.Generator().manual_seed(4))

    @cached_property
    def masks(self) -> list[torch.Tensor]:
        pairs = zip(self.widths[1:], self.widths[:-1], strict=True)
        return [random_mask(outputs, inputs, self.sparsity) for outputs, inputs in pairs]

    def weights(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [
            torch.randn(mask.shape, generator=generator) * mask / (0.1 * mask.shape[1]) ** 0.5 for mask in self.masks
        ]

    def ours(self) -> Runner:
        layers = [MaskedLinear(mask.shape[1], mask.shape[0], bias=False) for mask in self.masks]
        for layer, weight, mask in zip(layers, self.weights(), self.masks, strict=True):
            with torch.no_grad():
                layer.weight.copy_(weight)
            layer.set_mask(mask)
        model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        optimizer = MaskedSGD(model.parameters(), RATE, MOMENTUM, model=model)

        def call() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(self.input), self.label)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Runner(call, Agreement(1e-4, relative=True))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        if self.threads == 2:
            return {"torch": self.with_torch, "ours, one thread": self.one_thread}
        return {"torch": self.with_torch}

    def with_torch(self) -> Runner:
        weights, masks = [w.requires_grad_() for w in self.weights()], [mask.float() for mask in self.masks]
        momenta = [torch.zeros_like(w, requires_grad=False) for w in weights]

        def call() -> torch.Tensor:
            hidden = F.linear(self.input, weights[0] * masks[0]).relu()
            loss = F.cross_entropy(F.linear(hidden, weights[1] * masks[1]), self.label)
            grads = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, momentum, grad, mask in zip(weights, momenta, grads, masks, strict=True):
                    momentum.mul_(MOMENTUM).add_(grad)
                    weight.sub_(momentum * mask, alpha=RATE)
            return loss.detach()

        return Runner(call, Agreement(1e-4, relative=True), goal=4.0)

    def one_thread(self) -> Runner:
        return on_one_thread(self.ours(), 1.8, Agreement(1e-4, relative=True))

    def work(self) -> Work:
        # Three products per layer but for the first, whose input needs no gradient; kept weights, velocities and
        # gradients are read and written once.
        kept = [int(mask.sum()) for mask in self.masks]
        products = 2 * kept[0] + 3 * kept[1]
        return Work(flops=2.0 * self.batch * products, bytes_read=12.0 * sum(kept), bytes_written=8.0 * sum(kept))


@dataclass(eq=False)
class SgdCase(Case):
    """The optimizer by itself: momentum SGD of a 4096 x 4096 weight.

    `ordered`: MaskedSGD's whole step of a layer, which also writes the weight in the orders of its two products.
    """

    subject: ClassVar[str] = "pruning"
    sparsity: float
    quick: bool = False
    side: int = 4096
    ordered: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"masked SGD {self.sparsity:.0%} {self.side}x{self.side}" + (", in order" if self.ordered else "")

    @cached_property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Flat mask, weight, velocity, gradient."""
        mask = random_mask(self.side, self.side, self.sparsity).flatten()
        generator = torch.Generator().manual_seed(1)
        return mask, *(torch.randn(mask.numel(), generator=generator) * mask for _ in range(3))

    def ours(self) -> Runner:
        mask, weight, velocity, grad = self.tensors
        if self.ordered:
            return self.layer_step()
        kept, weight, velocity = kept_bits(mask), weight.clone(), velocity[mask]

        def call() -> torch.Tensor:
            masked_sgd(weight, velocity, grad, kept, rate=RATE, momentum=MOMENTUM)
            return weight

        return Runner(call, result=torch.Tensor.clone)

    def layer_step(self) -> Runner:
        mask, weight, velocity, grad = (t.view(self.side, self.side) for t in self.tensors)
        layer = MaskedLinear(self.side, self.side, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.set_mask(mask)
        layer(torch.zeros(1, self.side, requires_grad=True))
        optimizer = MaskedSGD(layer.parameters(), RATE, MOMENTUM, model=layer)
        optimizer.state[layer.weight]["momentum_buffer"] = velocity.clone()
        layer.weight.grad = grad

        def call() -> torch.Tensor:
            optimizer.step()
            return layer.weight.detach().view(-1)

        return Runner(call, result=torch.Tensor.clone)

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": self.with_torch}

    def with_torch(self) -> Runner:
        mask, weight, velocity, grad = (t.float().clone() for t in self.tensors)

        def call() -> torch.Tensor:
            velocity.mul_(MOMENTUM).add_(grad)
            weight.sub_(velocity * mask, alpha=RATE)
            return weight

        return Runner(call, FLOAT32, torch.Tensor.clone)

    def work(self) -> Work:
        # Weight, velocity and gradient of a kept entry are read, the first two written; the mask is a bit per entry.
        kept = int(self.tensors[0].sum())
        return Work(bytes_read=12.0 * kept + self.side**2 / 8, bytes_written=8.0 * kept)


@cache
def pruned_model(name: str, sparsity: float) -> nn.Module:
    """The network without the smallest weights of each layer, in masked layers."""
    compress = import_module("imgopt_fast.compress")
    model = copy.deepcopy(folded_model(name))
    compress.prune(model, compress.PruneConfig(sparsity=sparsity))
    return model.eval()


@dataclass(eq=False)
class PrunedCase(Int8Case):
    """Inference of a network pruned to 90 %, float32, packed, against the same weights in dense layers."""

    subject: ClassVar[str] = "pruning"
    sparsity: float = 0.9

    @property
    def name(self) -> str:  # type: ignore[override]
        text = f"{self.model} pruned {self.sparsity:.0%} N={self.batch}"
        return text + (", two threads" if self.threads == 2 else "")

    def ours(self) -> Runner:
        return self.forward(pack(copy.deepcopy(pruned_model(self.model, self.sparsity))))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        if self.threads == 2:
            return {"torch": self.with_dense, "ours, one thread": self.one_thread}
        return {"torch": self.with_dense}

    def with_dense(self) -> Runner:
        dense = copy.deepcopy(folded_model(self.model))
        dense.load_state_dict(pruned_model(self.model, self.sparsity).state_dict(), strict=False)
        runner = self.forward(dense, 2.0)
        return Runner(runner.call, Agreement(1e-3, relative=True), goal=2.0)

    def one_thread(self) -> Runner:
        return on_one_thread(self.ours(), 1.8, Agreement(1e-4, relative=True))

    def work(self) -> Work:
        # As for the int8 network, for the kept weights in float32.
        whole, weights = super().work(), size_of(self.model)[1]
        kept = 1 - self.sparsity
        return Work(
            flops=whole.int8_ops * kept,
            bytes_read=4.0 * (weights * kept + self.input.numel()),
            bytes_written=whole.bytes_written,
        )


CASES: list[Case] = [
    StepCase(quick=True),
    StepCase(threads=2),
    SgdCase(0.5),
    SgdCase(0.9),
    SgdCase(0.9, ordered=True),
    PrunedCase("resnet18", 1, quick=True),
    PrunedCase("resnet18", 16),
    PrunedCase("resnet18", 1, threads=2),
    PrunedCase("resnet18", 16, threads=2),
    *pruned_cifar.CASES,
]
