"""Scales that are powers of two: as fine as free ones wherever a constant can move between layers."""

import functools

import pytest
import torch
import torch.nn.functional as F
from small_networks import bottlenecks
from torch import Tensor, nn

from imgopt_fast.compress import Int8Config, quantize
from imgopt_fast.compress.quantize.plan import Plan
from imgopt_fast.compress.quantize.prepare import make_plan
from imgopt_fast.compress.quantize.simulate import Simulation

SHIFTS = Int8Config(power_of_two=True, equalize=False, bias_correction=False, rounding="nearest")


class Joined(nn.Module):
    """Adds, a concat, pools, a clamp of its own, a clamp that does not start at zero, and a float part in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.merge, self.last, self.fc = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.max_pool2d(x, 2)
        y = F.relu(self.left(x) + x)
        z = F.hardtanh(self.right(y), -0.7, 0.7)
        x = self.merge(torch.cat([y, z], 1))
        x = F.relu6(F.avg_pool2d(x, 2))
        x = self.last(F.silu(self.last(x)))
        return self.fc(x.mean((2, 3)))


@functools.cache
def subject(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    model = (Joined() if name == "joined" else bottlenecks(num_classes=5, in_channels=3)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 3.0)
            nn.init.normal_(module.bias, 0.5, 1.0)
    return model, 2 * torch.randn(24, 3, 32, 32)


@functools.cache
def planned(name: str) -> Plan:
    model, images = subject(name)
    return make_plan(model, [images], SHIFTS)


def decibels(expected: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(expected.double().var() / (expected - got).double().square().mean()))


@pytest.mark.parametrize("name", ["joined", "bottlenecks"])
def test_the_network_computes_what_it_did(name: str) -> None:
    model, images = subject(name)
    simulation = Simulation(planned(name))
    simulation.rounded = lambda operation: False
    torch.testing.assert_close(simulation(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["joined", "bottlenecks"])
def test_every_scale_is_a_power_of_two(name: str) -> None:
    network = quantize(*_arguments(name), SHIFTS)
    for key, value in network.named_buffers():
        if key.endswith("scale"):
            assert torch.equal(torch.frexp(value)[0], torch.full_like(value, 0.5)), key


def test_a_clamped_tensor_uses_all_levels_up_to_its_clamp() -> None:
    """In the units of the float network, where ReLU6 ends at 6, 255 steps of each scale end there or where the
    calibration says, and never beyond; a power of two in these units would be 6 / 192 or 6 / 96."""
    plan, free = planned("bottlenecks"), make_plan(*_arguments("bottlenecks"), Int8Config(equalize=False))
    clamped = 0
    for ours, theirs in zip(plan.fusion.operations.values(), free.fusion.operations.values(), strict=True):
        if theirs.maximum == 6.0:
            assert ours.maximum is not None
            step = plan.scales[ours.output].scale * 6.0 / ours.maximum
            assert step == pytest.approx(free.scales[theirs.output].scale, rel=1e-5)
            assert 255 * step <= 6.0 * (1 + 1e-6)
            assert ours.saturates
            clamped += 1
    assert clamped == 8
    layers = [part for part in quantize(*_arguments("bottlenecks"), SHIFTS).modules() if hasattr(part, "output_max")]
    assert all(layer.output_max is None for layer in layers), "saturation clamps"


@pytest.mark.parametrize("name", ["joined", "bottlenecks"])
def test_kernels_do_what_the_simulation_does(name: str) -> None:
    _, images = subject(name)
    with torch.no_grad():
        simulated = Simulation(planned(name))(images)
    assert decibels(simulated, quantize(*_arguments(name), SHIFTS)(images)) > 60


def test_powers_of_two_come_near_free_scales() -> None:
    model, images = subject("bottlenecks")
    quality = [
        decibels(model(images), quantize(model, [images], Int8Config(power_of_two=shifts))(images))
        for shifts in (False, True)
    ]
    assert quality[1] > quality[0] - 4


def test_a_network_quantized_for_its_structure_takes_the_weights_of_another() -> None:
    """As a run folder is loaded: what a clamp became may not depend on the numbers."""
    for name in ("joined", "bottlenecks"):
        model, images = subject(name)
        network = quantize(model, [images], SHIFTS)
        torch.manual_seed(9)
        other = (Joined() if name == "joined" else bottlenecks(num_classes=5, in_channels=3)).eval()
        skeleton = quantize(other, [torch.rand(2, 3, 32, 32)], SHIFTS)
        skeleton.load_state_dict(network.state_dict())
        assert torch.equal(skeleton(images), network(images))


@functools.cache
def _arguments(name: str) -> tuple[nn.Module, list[Tensor]]:
    model, images = subject(name)
    return model, [images]
