"""Residual networks (He et al. 2016): the small ones for images of about 32 pixels, and ResNet-18 and -50.

The parameters carry torchvision's names (`conv1`, `layer1.0.bn1`, `fc`), so published weights of ResNet-18 and -50
load unchanged. Every addition and activation is a plain call, which keeps the graph easy to trace and to quantize.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside an identity, or a 1×1 projection where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1 down, 3×3 with the stride, 1×1 up to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.downsample = _projection(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """A stem, one stage per entry of `widths` and `depths` (blocks), the mean over the pixels, one linear layer."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_classes: int,
        in_channels: int,
        stem_kernel: int,
        stem_stride: int,
        stem_pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], stem_kernel, stem_stride, stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        self.stages = len(depths)
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = nn.Sequential()
            for i in range(depth):
                blocks.append(block(channels, width, stride=2 if stage > 0 and i == 0 else 1))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", blocks)
        self.fc = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet8(num_classes: int, in_channels: int = 3) -> ResNet:
    """Three blocks of 32, 64 and 128 channels behind a stem of stride 2, for 28 to 64 pixels: 308k parameters.

    Wider and at half the resolution of the CIFAR networks below, because a CPU core does the same number of
    multiplications in half the time on 32 channels and more.
    """
    return ResNet(
        BasicBlock,
        (1, 1, 1),
        (32, 64, 128),
        num_classes=num_classes,
        in_channels=in_channels,
        stem_kernel=3,
        stem_stride=2,
    )


def resnet20(num_classes: int, in_channels: int = 3) -> ResNet:
    """The 20-layer CIFAR network of He et al., with a projection where the shape changes: 272k parameters."""
    return ResNet(
        BasicBlock,
        (3, 3, 3),
        (16, 32, 64),
        num_classes=num_classes,
        in_channels=in_channels,
        stem_kernel=3,
        stem_stride=1,
    )


def resnet18(num_classes: int, in_channels: int = 3) -> ResNet:
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        num_classes=num_classes,
        in_channels=in_channels,
        stem_kernel=7,
        stem_stride=2,
        stem_pool=True,
    )


def resnet50(num_classes: int, in_channels: int = 3) -> ResNet:
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        num_classes=num_classes,
        in_channels=in_channels,
        stem_kernel=7,
        stem_stride=2,
        stem_pool=True,
    )


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # Each block starts as the identity (Goyal et al. 2017), which allows a higher learning rate from the first step.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BasicBlock):
                module.bn2.weight.zero_()
            elif isinstance(module, Bottleneck):
                module.bn3.weight.zero_()
