"""trace: what models do to memory and sizes on the way to a graph that computes what they compute."""

import pytest
import torch
import torch.nn.functional as F
from quantized_networks import SamePadConv, decibels
from torch import nn

from imgopt_fast.compress import quantize
from imgopt_fast.compress.quantize.trace import trace


def whole_read_later(y):
    y[:, :4].relu_()
    return y


def only_the_slice_read_later(y):
    z = y[:, :4]
    z += 1
    return z * 2


def overlapping_slice_read_later(y):
    z, other = y[:, :4], y[:, 2:6]
    z.relu_()
    return z + other


def view_of_a_view_read_later(y):
    y = y[:, :4]
    inner = y[:, 1:3]
    y.relu_()
    return inner * 1


def slice_taken_before_the_write(y):
    y += 1
    z = y[:, 2:]
    y.relu_()
    return z


def chunk_written(y):
    first, _ = y.chunk(2, 1)
    first.relu_()
    return y


def axes_moved(y):
    y.movedim(1, 2).relu_()
    return y


def written_twice_then_a_slice(y):
    y.relu_()
    y.add_(1)
    z = y[:, 2:]
    z.mul_(3.0)
    return z


class Tail(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.conv, self.tail = nn.Conv2d(3, 8, 3, padding=1), tail

    def forward(self, x):
        return self.tail(self.conv(x))


@pytest.mark.parametrize(
    ("tail", "scatters"),
    [
        (whole_read_later, True),
        (only_the_slice_read_later, False),
        (overlapping_slice_read_later, True),
        (view_of_a_view_read_later, True),
        (slice_taken_before_the_write, False),
        (chunk_written, True),
        (axes_moved, False),
        (written_twice_then_a_slice, False),
    ],
)
def test_writing_into_shared_memory(tail, scatters):
    """The graph is functional; where nobody reads the memory under another name it stays free of scatters."""
    model, images = Tail(tail).eval(), torch.randn(4, 3, 6, 6)
    graph, _ = trace(model, images)
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))
    assert any("scatter" in str(node.target) for node in graph.graph.nodes) == scatters


def test_sizes_behind_padding_that_depends_on_them_are_not_followed():
    """Each layer would nest another expression: 200 s for EfficientNet-B0."""
    calls = []
    model = nn.Sequential(*(SamePadConv(3, 3, 3, 2) for _ in range(6))).eval()
    model[1].register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape))
    _, size = trace(model, torch.randn(2, 3, 64, 64))
    assert size == (64, 64)
    assert calls == [(2, 3, 32, 32)]


class Trimmed(nn.Module):
    """A ghost module: it makes as many channels as there may be and keeps the first; a shortcut is added in place."""

    def __init__(self):
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shortcut, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        y = F.relu(self.primary(x))
        y = torch.cat([y, F.relu(self.cheap(y))], 1)[:, :16]
        y += self.shortcut(x)
        return self.last(y)


class ConvBesidePool(nn.Module):
    """Sizes that are equal, though not as expressions of the image size."""

    def __init__(self):
        super().__init__()
        self.stem, self.strided, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(F.relu(self.strided(x) + F.max_pool2d(x, 2)))


@pytest.mark.parametrize("model", [Trimmed(), ConvBesidePool()], ids=["trimmed", "conv beside pool"])
def test_runs_in_int8_as_a_whole(model):
    result = quantize(model.eval(), [torch.randn(64, 3, 8, 8)])
    assert not result.report.float_layers
    for size in (8, 12):
        images = torch.randn(3, 3, size, size)
        with torch.no_grad():
            assert decibels(model(images), result(images)) > 25
