"""Pruned layers inside int8 networks: skipping their zeros changes the time, never a bit."""

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import BACKEND
from torch import Tensor, nn

from imgopt_fast import _native
from imgopt_fast.compress import Int8Config, PruneConfig, prune, quantize
from imgopt_fast.nn import Int8Segment
from imgopt_fast.nn import int8_sparse as sparse

pytestmark = pytest.mark.skipif(BACKEND != "native", reason="zeros are skipped by the compiled kernels only")


@pytest.fixture(autouse=True)
def _one_rule_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of every instruction set are tested, those too that no rule would choose."""
    rule = sparse.LARGEST_SHARE["avx512"]
    monkeypatch.setattr(sparse, "LARGEST_SHARE", dict.fromkeys(_native.supported_isas(), rule))


class Mixed(nn.Module):
    """Sparse layers at the beginning, between, beside a residual, behind a clamp and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grow = nn.Conv2d(6, 1024, 3), nn.Conv2d(1024, 40, 1)
        self.wide, self.back = nn.Conv2d(40, 1024, 1), nn.Conv2d(1024, 40, 1)
        self.hidden, self.last = nn.Linear(1440, 1200), nn.Linear(1200, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grow(torch.relu(self.first(x))))
        x = x + torch.nn.functional.relu6(self.back(torch.relu(self.wide(x))))
        result: Tensor = self.last(torch.relu(self.hidden(x.flatten(1))))
        return result


def quantized(power_of_two: bool = False, sparsity: float = 0.985) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(20, 6, 8, 8)
    prune(model, PruneConfig(sparsity=sparsity, exclude=("first",)))
    return quantize(model.eval(), [x], Int8Config(power_of_two=power_of_two)), x


def segments(model: nn.Module) -> list[Int8Segment]:
    return [module for module in model.modules() if isinstance(module, Int8Segment)]


def skipped(model: nn.Module) -> set[str]:
    return {segment.steps[at].name for segment in segments(model) for at in segment._sparse}


@pytest.mark.parametrize("power_of_two", [False, True])
def test_skipping_zeros_changes_no_bit(power_of_two: bool) -> None:
    model, x = quantized(power_of_two)
    assert skipped(model) == {"grow", "back", "hidden", "last"}
    ours = model(x)
    few = model(x[: sparse.FEWEST_IMAGES - 1])  # dense
    dense = copy.deepcopy(model)
    for segment in segments(dense):
        segment._sparse = {}
    assert torch.equal(ours, dense(x))
    assert torch.equal(few, dense(x)[: len(few)])
    assert ours.std() > 0


def test_travels_like_any_int8_network() -> None:
    model, x = quantized()
    expected = model(x)
    other, _ = quantized(sparsity=0.2)  # a network of the same structure that skips nothing
    assert not skipped(other)
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.network)), other):
        assert torch.equal(copied(x), expected)
        assert skipped(copied) == skipped(model)


def test_exports_with_any_number_of_images() -> None:
    """Skipping zeros asks for the number of images, an exported program must not."""
    model, x = quantized()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("images")},))
    assert torch.equal(program.module()(x[:5]), model(x[:5]))


def test_report_says_what_happens_to_zeros() -> None:
    model, _ = quantized()
    zeros = {layer.name: layer.zeros for layer in model.report.layers}
    assert zeros["first"] == ""
    assert zeros["hidden"] == "98% zeros, skipped for 16 images and more"
    assert zeros["wide"] == "99% zeros, dense: faster than skipping them"
    assert "skipped for 16 images" in str(model.report)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    prune(plain, PruneConfig(sparsity=0.9))
    report = quantize(plain.eval(), [torch.randn(4, 8, 9, 9)]).report
    assert "90% zeros, dense: only linear layers" in str(report)


def test_sums_that_float32_cannot_hold_stay_dense_with_shifts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40_000, 8), nn.ReLU(), nn.Linear(8, 4))
    prune(model, PruneConfig(sparsity=0.96))  # 1600 weights a row, 255 * 127 each at most: above 2^24
    x = torch.randn(16, 40_000)
    assert skipped(quantize(model.eval(), [x])) == {"0"}
    shifting = quantize(model, [x], Int8Config(power_of_two=True))
    for segment in segments(shifting):
        layer: Any = segment.get_submodule(segment.steps[1].name)
        exact = int((layer.weight_int8.long().abs().sum(1) * 255).max()) < sparse.EXACT
        assert bool(segment._sparse) == exact
        assert not exact


@pytest.mark.parametrize(("inputs", "groups", "expected"), [(512, 1, False), (1024, 51, True), (1024, 52, False),
                                                            (2048, 174, True), (4096, 349, False), (1022, 1, False),
                                                            (4095, 340, True)])  # fmt: skip
def test_the_rule(inputs: int, groups: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups of four count, however many of their weights are there."""
    monkeypatch.setattr(sparse._native, "active_isa", lambda: "avx512")
    for weights in (1, 4):
        weight = torch.zeros(8, -(-inputs // 4), 4, dtype=torch.int8)
        weight[:, :groups, :weights] = 1
        assert sparse.wins(weight.flatten(1)[:, :inputs]) == expected
    assert sparse.wins(torch.zeros(0, inputs, dtype=torch.int8))
