"""The pruner: which weights go, when, and that they stay away whatever the optimizer does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast.compress import MaskedSGD, PruneConfig, Pruner, prune, pruning_sensitivity
from imgopt_fast.compress.prune import masked_layers
from imgopt_fast.nn import MaskedConv2d, MaskedLinear


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Sequential(nn.Linear(12 * 16, 16), nn.ReLU(), nn.Linear(16, 10)),
    )  # fmt: skip


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    pruner.step()


def test_swaps_what_can_be_pruned() -> None:
    model = network()
    weights = list(model.parameters())
    pruner = prune(model, PruneConfig(sparsity=0.5, exclude=("6.2",)))
    kinds = [type(model[i]) for i in (0, 2, 3)] + [type(model[6][i]) for i in (0, 2)]  # type: ignore[index]
    assert kinds == [nn.Conv2d, nn.Conv2d, MaskedConv2d, MaskedLinear, nn.Linear]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert list(pruner.layers) == ["3", "6.0"]
    with pytest.raises(ValueError, match=r"^exclude: "):
        prune(network(), PruneConfig(exclude=("nothing",)))
    outer = prune(network(), PruneConfig(exclude=("6",)))
    assert list(outer.layers) == ["3"]


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_shot(method: Any, scope: Any) -> None:
    model = network()
    pruner = prune(model, PruneConfig(sparsity=0.75, method=method, scope=scope))
    assert pruner.sparsity == pytest.approx(0.75, abs=1e-3)
    for layer in pruner.layers.values():
        assert not layer.weight[~layer.weight_mask].any()
        if scope == "layer":
            assert layer.density() == pytest.approx(0.25, abs=1e-2)
    report = pruner.report()
    assert [line.name for line in report] == list(pruner.layers)
    assert report[0].shape == (12, 8, 3, 3)
    assert all(line.kernel for line in report)


def test_magnitude_removes_the_smallest() -> None:
    layer = nn.Linear(8, 4)
    expected = layer.weight.detach().abs().flatten().sort().values
    pruner = prune(nn.Sequential(layer), PruneConfig(sparsity=0.5))
    kept = pruner.layers["0"].weight.detach().abs()
    assert torch.equal(kept[kept > 0].sort().values, expected[16:])


def test_global_ranks_all_layers_together() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(100)  # type: ignore[operator]
    pruner = prune(model, PruneConfig(sparsity=0.5, scope="global"))
    densities = [layer.density() for layer in pruner.layers.values()]
    assert densities[0] > 0.9
    assert densities[1] < 0.1


@pytest.mark.parametrize("structure", ["4x1", "1x4", "2x3"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_blocks_stand_or_fall_together(structure: str, scope: Any) -> None:
    rows, columns = map(int, structure.split("x"))
    model = nn.Sequential(nn.Conv2d(12, 8, 3), nn.Flatten(), nn.Linear(8, 24))
    pruner = prune(model, PruneConfig(sparsity=0.6, structure=structure, scope=scope))
    assert pruner.sparsity == pytest.approx(0.6, abs=0.02)
    for layer in pruner.layers.values():
        mask = layer.weight_mask
        if mask.dim() == 4:
            mask = mask.permute(0, 2, 3, 1).flatten(1)
        for i in range(0, mask.shape[0], rows):
            for j in range(0, mask.shape[1], columns):
                assert len(set(mask[i : i + rows, j : j + columns].flatten().tolist())) == 1


def test_n_of_m() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 5))
    prune(model, PruneConfig(structure="2:4"))
    conv_mask: Tensor = model[0].weight_mask  # type: ignore[assignment]
    assert bool((conv_mask.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all())
    linear_mask: Tensor = model[2].weight_mask  # type: ignore[assignment]
    assert bool((linear_mask[:, :4].sum(1) == 2).all())
    assert bool((linear_mask[:, 4:].sum(1) == 2).all())


def test_cubic_ramp() -> None:
    config = PruneConfig(sparsity=0.8, start_step=4, end_step=12, update_every=3)
    assert [config.sparsity_at(s) for s in (0, 3, 4, 12, 99)] == [0, 0, 0, 0.8, 0.8]
    assert config.sparsity_at(8) == pytest.approx(0.8 * (1 - 0.5**3))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = prune(model, config, optimizer)
    seen = []
    for _ in range(14):
        train_step(model, optimizer, pruner)
        seen.append(pruner.sparsity)
    assert seen == sorted(seen)
    changes = [step for step in range(1, 14) if seen[step] != seen[step - 1]]
    assert [c + 1 for c in changes] == [7, 10, 12]
    assert seen[-1] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("start", [3, 0])
def test_one_shot_at_a_step(start: int) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = prune(model, PruneConfig(sparsity=0.5, start_step=start), optimizer)
    seen = [pruner.sparsity]
    for _ in range(4):
        train_step(model, optimizer, pruner)
        seen.append(pruner.sparsity)
    assert [s > 0 for s in seen] == [step >= start for step in range(5)]


@pytest.mark.parametrize("kind", ["momentum", "nesterov", "adam", "adamw"])
def test_pruned_weights_stay_zero(kind: str) -> None:
    model = network()
    optimizer: torch.optim.Optimizer
    if kind in ("momentum", "nesterov"):
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, nesterov=kind == "nesterov", weight_decay=0.1
        )
    else:
        optimizer = (torch.optim.Adam if kind == "adam" else torch.optim.AdamW)(model.parameters(), 0.1)
    pruner = prune(model, PruneConfig(sparsity=0.7, start_step=2), optimizer)
    for step in range(6):
        train_step(model, optimizer, pruner)
        if step >= 2:
            for layer in pruner.layers.values():
                assert not layer.weight[~layer.weight_mask].any()
                for value in optimizer.state[layer.weight].values():
                    if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                        assert not value[~layer.weight_mask].any()


def test_resumes() -> None:
    config = PruneConfig(sparsity=0.8, start_step=0, end_step=8, update_every=2)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = prune(model, config, optimizer)
    for _ in range(3):
        train_step(model, optimizer, pruner)
    states = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))

    other = network()
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    other_pruner = prune(other, config, other_optimizer)
    for target, state in zip((other, other_optimizer, other_pruner), states, strict=True):
        target.load_state_dict(state)  # type: ignore[attr-defined]
    for seed in range(5):
        torch.manual_seed(seed)
        train_step(model, optimizer, pruner)
        torch.manual_seed(seed)
        train_step(other, other_optimizer, other_pruner)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_masks_only_grow() -> None:
    """A weight that is gone stays gone, also where its neighbours have shrunk below it."""
    model = nn.Sequential(nn.Linear(20, 20))
    pruner = prune(model, PruneConfig(sparsity=0.8, method="random", start_step=1, end_step=6))
    before = torch.ones(20, 20, dtype=torch.bool)
    for _ in range(6):
        with torch.no_grad():
            model[0].weight.normal_()  # type: ignore[operator]
        pruner.step()
        mask: Tensor = model[0].weight_mask.clone()  # type: ignore[operator, assignment]
        assert not bool((mask & ~before).any())
        before = mask


def test_bad_config() -> None:
    for name, options in {
        "sparsity": {"sparsity": 1.5},
        "method": {"method": "best"},
        "scope": {"scope": "house"},
        "structure": {"structure": "4*1"},
        "structure:": {"structure": "5:4"},
        "start_step": {"update_every": 0},
        "regrow": {"regrow": "often", "end_step": 9},
        "regrow:": {"regrow": "random", "structure": "2:4", "end_step": 9},
        "end_step": {"regrow": "random"},
        "drop_fraction": {"regrow": "random", "end_step": 9, "drop_fraction": 0.0},
    }.items():
        with pytest.raises(ValueError, match=f"^{name.rstrip(':')}"):
            PruneConfig(**options)  # type: ignore[arg-type]


def every_mask(model: nn.Module) -> list[Tensor]:
    return [layer.weight_mask.clone() for _, layer in masked_layers(model)]


@pytest.mark.parametrize("structure", ["unstructured", "2x2"])
@pytest.mark.parametrize("regrow", ["gradient", "random"])
def test_dynamic_masks_move_and_keep_their_size(regrow: Any, structure: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    config = PruneConfig(
        sparsity=0.7, start_step=2, end_step=14, update_every=4, regrow=regrow, structure=structure, drop_fraction=0.5
    )
    pruner = prune(model, config, optimizer)
    changed = []
    for step in range(1, 18):
        before = every_mask(model)
        train_step(model, optimizer, pruner)
        after = every_mask(model)
        moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        changed += [step] * moved
        if step > 2:
            for old, new in zip(before, after, strict=True):
                assert old.sum() == new.sum()
        if step >= 2:
            for layer in pruner.layers.values():
                assert not layer.weight[~layer.weight_mask].any()
                assert not optimizer.state[layer.weight]["momentum_buffer"][~layer.weight_mask].any()
    assert changed == [2, 6, 10]
    assert pruner.sparsity == pytest.approx(0.7, abs=0.01)


def test_gradient_regrowth_is_that_of_rigl() -> None:
    """Written out for one layer: drop the smallest kept weights, grow where the dense gradient is largest."""
    torch.manual_seed(5)
    layer = nn.Linear(12, 9)
    model = nn.Sequential(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = PruneConfig(sparsity=0.6, start_step=0, end_step=10, update_every=2, regrow="gradient", drop_fraction=0.4)
    pruner = prune(model, config, optimizer)
    x, y = torch.randn(8, 12), torch.randn(8, 9)
    for step in (1, 2):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        mask = pruner.layers["0"].weight_mask.clone()
        weight = layer.weight.detach().clone().requires_grad_()
        (nn.functional.linear(x, weight, layer.bias) - y).square().sum().backward()
        assert weight.grad is not None
        assert layer.weight.grad is not None
        expected = weight.grad if step == 2 else weight.grad * mask  # dense in the step that will regrow by it
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)
        optimizer.step()
        stepped = layer.weight.detach().clone()
        pruner.step()
    count = round(config.moving_at(2) * int(mask.sum()))
    assert count > 3
    order = torch.where(mask, stepped.abs(), torch.inf).flatten().argsort()
    growth = torch.where(mask, -1, weight.grad.abs()).flatten().argsort(descending=True)
    expected_mask = mask.clone().flatten()
    expected_mask[order[:count]] = False
    expected_mask[growth[:count]] = True
    assert torch.equal(pruner.layers["0"].weight_mask.flatten(), expected_mask)
    assert not layer.weight.flatten()[growth[:count]].any()


@pytest.mark.parametrize("kind", ["sgd", "masked sgd", "adam"])
@pytest.mark.parametrize("regrow", ["gradient", "random", None])
def test_resumes_to_the_bit(regrow: Any, kind: str) -> None:
    config = PruneConfig(sparsity=0.8, start_step=1, end_step=11, update_every=3, regrow=regrow)

    def make() -> tuple[nn.Module, Any, Pruner]:
        torch.manual_seed(2)
        model = network()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        if kind == "masked sgd":
            optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, model=model)
        if kind == "adam":
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        return model, optimizer, prune(model, config, optimizer)

    for stop in (3, 4):  # 4 is an update, before which gradients are dense
        parts = make()
        for seed in range(stop):
            torch.manual_seed(seed)
            train_step(*parts)
        states = copy.deepcopy([part.state_dict() for part in parts])
        resumed = make()
        for part, state in zip(resumed, states, strict=True):
            part.load_state_dict(state)
        for seed in range(stop, 13):
            for each in (parts, resumed):
                torch.manual_seed(seed)
                train_step(*each)
        for a, b in zip(parts[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_regrowth_needs_the_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pruner = prune(model, PruneConfig(sparsity=0.5, end_step=4, regrow="gradient"))
    with pytest.raises(RuntimeError, match=r"^0: no gradient"):
        pruner.step()


def test_report_counts_bytes_and_measures_on_demand() -> None:
    model = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 40))
    unused = nn.Linear(64, 64)
    model.add_module("unused", unused)
    pruner = prune(model, PruneConfig(sparsity=0.9))
    model.train()
    plain = pruner.report()
    assert all(line.speedup is None and line.break_even is None for line in plain)
    for line in plain:
        assert line.density == pytest.approx(0.1, abs=0.01)
        assert line.dense_bytes == 4 * torch.Size(line.shape).numel()
        assert line.packed_bytes < 0.25 * line.dense_bytes
    assert "break-even" not in str(plain)
    del model.unused
    pruner.layers["unused"] = prune(nn.Sequential(unused), PruneConfig(sparsity=0.5)).layers["0"]
    measured = pruner.report(torch.randn(2, 32, 4, 4))
    assert model.training
    for line in measured[:2]:
        assert line.speedup is not None
        assert line.speedup > 0
        assert line.break_even is not None
        assert 0 <= line.break_even <= 1
    assert measured[2].seconds is None
    assert "break-even" in str(measured)
    assert "not reached" in str(measured)


@pytest.mark.parametrize("structure", ["unstructured", "4x1", "2:4"])
def test_sensitivity_scan(structure: str) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 8, 8)

    def evaluate(pruned: nn.Module) -> float:
        assert not pruned.training
        return float(pruned(x).square().mean())

    rows = pruning_sensitivity(model, evaluate, (0.0, 0.5, 1.0), PruneConfig(structure=structure, exclude=("6.2",)))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    if structure == "2:4":
        assert [(row.layer, row.sparsity) for row in rows] == [("3", 0.5), ("6.0", 0.5)]
        return
    assert [(row.layer, row.sparsity) for row in rows] == [(n, s) for n in ("3", "6.0") for s in (0.0, 0.5, 1.0)]
    assert rows[0].change == rows[3].change == 0.0
    assert rows[2].change != 0.0
    empty = copy.deepcopy(model).eval()
    nn.init.zeros_(empty[3].weight)  # type: ignore[arg-type]
    assert rows[2].score == pytest.approx(float(empty(x).square().mean().detach()), rel=1e-5)
    with pytest.raises(ValueError, match=r"^structure: "):
        pruning_sensitivity(model, evaluate, config=PruneConfig(structure="channels"))


def test_sensitivity_restores_after_an_error() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def evaluate(pruned: nn.Module) -> float:
        calls.append(pruned)
        if len(calls) == 2:
            raise RuntimeError("out of data")
        return 0.0

    with pytest.raises(RuntimeError, match="out of data"):
        pruning_sensitivity(model, evaluate)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
