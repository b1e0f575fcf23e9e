"""Small networks of every shape that quantize meets; their plans and int8 forms cost seconds and are shared."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from imgopt_fast.compress import Int8Config
from imgopt_fast.compress.quantize.model import to_int8
from imgopt_fast.compress.quantize.prepare import make_plan


class Residual(nn.Module):
    """Residual blocks with a projection, max pool, global pool: the shape of a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.bn1 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 20, 3, 2, 1), nn.BatchNorm2d(20)
        self.down = nn.Sequential(nn.Conv2d(12, 20, 1, 2, bias=False), nn.BatchNorm2d(20))
        self.fc = nn.Linear(20, 7)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 3, 2, 1)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        x = F.relu_(y)
        x = torch.relu(self.bn3(self.conv3(x)) + self.down(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Inverted(nn.Module):
    """Inverted bottlenecks with depthwise convolutions and ReLU6: the shape of a MobileNetV2."""

    def __init__(self):
        super().__init__()

        def unit(i, o, k, stride=1, groups=1, act=True):
            layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
            return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))

        self.stem = unit(3, 8, 3, 2)
        self.block1 = nn.Sequential(unit(8, 24, 1), unit(24, 24, 3, groups=24), unit(24, 8, 1, act=False))
        self.block2 = nn.Sequential(unit(8, 24, 1), unit(24, 24, 5, 2, groups=24), unit(24, 16, 1, act=False))
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block1(x)
        return self.fc(self.drop(self.block2(x).mean([2, 3])))


class Branches(nn.Module):
    """Concats, a batch norm that no convolution precedes, an average pool: DenseNet and Inception."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, (1, 5), padding=(0, 2))
        self.norm = nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 9, 3, padding="same", bias=False)
        self.fc = nn.Linear(9 * 16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.left(x)), self.right(x)], 1)
        x = F.avg_pool2d(F.relu(self.norm(x)), 2)
        return self.fc(self.last(x).clamp(-1.5, 2.5).view(x.size(0), -1))


class SamePadConv(nn.Conv2d):
    """TensorFlow's padding: computed from the image, one more below and right."""

    def forward(self, x):
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride)


class Islands(nn.Module):
    """What has no int8 form between what has: SiLU, hardswish, squeeze-excite, layer norm."""

    def __init__(self):
        super().__init__()
        self.stem = SamePadConv(3, 16, 3, 2)
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.conv2, self.conv3 = nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Conv2d(16, 16, 1)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        assert x.shape[1] == 3
        x = F.silu(self.stem(x))
        y = F.hardswish(self.bn1(self.conv1(x)))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + y * gate
        x = F.relu(self.conv3(F.relu(self.conv2(x)))) + x
        return self.fc(self.norm(x.mean((2, 3))))


NETWORKS = {"residual": Residual, "inverted": Inverted, "branches": Branches, "islands": Islands}


@functools.cache
def network(name):
    """A network whose batch norms are not trivial, and images for it."""
    torch.manual_seed(3)
    model = NETWORKS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    size = (8, 8) if name == "branches" else (32, 30)
    return model.requires_grad_(False), torch.randn(48, 3, *size)


@functools.cache
def planned(name):
    """Its plan: tracing costs seconds, so the tests share it."""
    model, images = network(name)
    return make_plan(model, images.split(16), Int8Config())


@functools.cache
def quantized(name):
    """Its int8 form; tests copy it before they change it."""
    return to_int8(planned(name))


def decibels(expected, got):
    """Signal to quantization noise of the whole output."""
    expected, got = expected.detach().double(), got.detach().double()
    return float(10 * torch.log10(expected.var() / (expected - got).square().mean()))
