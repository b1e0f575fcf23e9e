"""Networks that processes of their own import by name; the import draws no random numbers."""

import torch.nn.functional as F
from torch import Tensor, nn


def no_batch_norm(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.Flatten(),
        nn.Linear(72, num_classes),
    )


def bottlenecks(num_classes: int, in_channels: int) -> nn.Module:
    """A MobileNetV2 of three blocks: expansions, depthwise convolutions, ReLU6, a linear residual."""

    def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            hidden = 4 * inputs
            self.expand, self.depthwise = unit(inputs, hidden, 1), unit(hidden, hidden, 3, stride, hidden)
            self.project, self.residual = unit(hidden, outputs, 1), stride == 1 and inputs == outputs

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))
            return x + y if self.residual else y

    stem, head = unit(in_channels, 16, 3, 2), unit(32, 64, 1)
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 32, 1)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)]
    return nn.Sequential(stem, nn.ReLU6(), *blocks, head, nn.ReLU6(), *pooled)
