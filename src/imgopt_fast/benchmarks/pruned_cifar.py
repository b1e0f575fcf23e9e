"""Networks of CIFAR's size, 90 % pruned, beside the same networks dense: a step of training and inference.

Dense means what a user without pruning runs: torch's own layers, torch's SGD. Both start from the same weights, zeros
included, so the loss of the first step agrees. Images are random, in channels_last memory; speed does not depend on
what they show.
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

from imgopt_fast.benchmarks.case import Agreement, Case, Runner, Work
from imgopt_fast.benchmarks.counting import multiply_adds
from imgopt_fast.benchmarks.networks import channels_last
from imgopt_fast.compress import MaskedSGD, PruneConfig, pack, prune
from imgopt_fast.models import resnet20
from imgopt_fast.models.resnet import BasicBlock, ResNet

SIDE, CLASSES = 32, 10
RATE, MOMENTUM = 1e-3, 0.9
AGREEMENT = Agreement(1e-3, relative=True)


def resnet18_small(num_classes: int, in_channels: int = 3) -> ResNet:
    """ResNet-18 as it is used on small images: a 3 x 3 stem of stride 1, no pooling before the stages."""
    return ResNet(
        BasicBlock, (2, 2, 2, 2), (64, 128, 256, 512), num_classes=num_classes, in_channels=in_channels, stem_kernel=3,
        stem_stride=1,
    )  # fmt: skip


NETWORKS: Mapping[str, Callable[[int], nn.Module]] = {"resnet18 3x3 stem": resnet18_small, "resnet20": resnet20}


@cache
def pruned(name: str, sparsity: float) -> nn.Module:
    """The network in masked layers, without the smallest weights of each."""
    torch.manual_seed(0)
    model = NETWORKS[name](CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # residual branches that count
    prune(model, PruneConfig(sparsity=sparsity))
    return channels_last(model)


def dense(name: str, sparsity: float) -> nn.Module:
    """The same weights in torch's layers."""
    model = channels_last(NETWORKS[name](CLASSES))
    model.load_state_dict({k: v for k, v in pruned(name, sparsity).state_dict().items() if "weight_mask" not in k})
    return model


@dataclass(eq=False)
class SmallInferenceCase(Case):
    """Packed layers against dense ones, batch norms folded on both sides."""

    subject: ClassVar[str] = "pruning"
    network: str
    batch: int = 16
    sparsity: float = 0.9
    quick: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.network} @{SIDE} pruned {self.sparsity:.0%} N={self.batch}"

    @cached_property
    def input(self) -> torch.Tensor:
        x = torch.randn(self.batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
        return x.contiguous(memory_format=torch.channels_last)

    def folded(self) -> nn.Module:
        fuse = import_module("torch.fx.experimental.optimization").fuse
        return channels_last(fuse(dense(self.network, self.sparsity).eval()))

    def ours(self) -> Runner:
        model = self.folded()
        prune(model, PruneConfig(sparsity=self.sparsity))  # the same weights: zeros are the least
        return self.forward(pack(model.eval()))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch": lambda: self.forward(self.folded())}

    def forward(self, model: nn.Module) -> Runner:
        def call() -> torch.Tensor:
            with torch.inference_mode():
                output: torch.Tensor = model(self.input)
                return output

        return Runner(call, AGREEMENT)

    def work(self) -> Work:
        # A multiply-add per kept weight and place; images and kept weights are read once, logits written.
        model = dense(self.network, self.sparsity)
        kept, weights = 1 - self.sparsity, sum(p.numel() for p in model.parameters())
        return Work(
            flops=2.0 * self.batch * kept * multiply_adds(model, self.input[:1]),
            bytes_read=4.0 * (kept * weights + self.input.numel()),
            bytes_written=4.0 * self.batch * CLASSES,
        )


@dataclass(eq=False)
class SmallStepCase(SmallInferenceCase):
    """Forward, backward and SGD with momentum."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"training step {self.sparsity:.0%} {self.network} @{SIDE} N={self.batch}"

    @cached_property
    def label(self) -> torch.Tensor:
        return torch.randint(0, CLASSES, (self.batch,), generator=torch.Generator().manual_seed(4))

    def ours(self) -> Runner:
        model = copy.deepcopy(pruned(self.network, self.sparsity)).train()
        return self.step(model, MaskedSGD(model.parameters(), RATE, MOMENTUM, model=model))

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        return {"torch dense": self.with_dense}

    def with_dense(self) -> Runner:
        model = dense(self.network, self.sparsity).train()
        return self.step(model, torch.optim.SGD(model.parameters(), RATE, MOMENTUM))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Runner:
        def call() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(self.input), self.label)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return Runner(call, AGREEMENT)

    def work(self) -> Work:
        # Three products instead of one; kept weights, velocities and gradients are read, the first two written.
        forward = super().work()
        kept = (1 - self.sparsity) * sum(p.numel() for p in dense(self.network, self.sparsity).parameters())
        return Work(
            flops=3 * forward.flops, bytes_read=forward.bytes_read + 8.0 * kept, bytes_written=8.0 * kept
        )  # fmt: skip


CASES: list[Case] = [
    SmallStepCase("resnet18 3x3 stem"),
    SmallStepCase("resnet20", 64),
    SmallInferenceCase("resnet18 3x3 stem"),
    SmallInferenceCase("resnet20", 64),
]
