"""masked_sgd: every backend, bit for bit, against the step written out; MaskedSGD against torch's SGD."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imgopt_fast import _native
from imgopt_fast.compress import MaskedSGD, PruneConfig, prune
from imgopt_fast.nn import MaskedLinear
from imgopt_fast.ops.masked_sgd import KeptBits, fallback, kept_bits, masked_sgd, reference

OPTIONS: list[dict[str, Any]] = [
    {"rate": 0.13},
    {"rate": 0.13, "weight_decay": 0.07},
    {"rate": 0.11, "momentum": 0.9, "weight_decay": 0.03, "first": True},
    {"rate": 0.11, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.03},
    {"rate": 0.11, "momentum": 0.7, "weight_decay": 0.01, "nesterov": True},
]
SIZES = [0, 1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 77]
DENSITIES = [0.0, 0.02, 0.5, 0.97, 1.0]


def problem(size: int, density: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = torch.rand(size) < density
    return torch.randn(size), torch.randn(int(mask.sum())), torch.randn(size), mask


def by_hand(
    weight: Tensor, velocity: Tensor | None, grad: Tensor, mask: Tensor, *, rate: float, momentum: float = 0,
    dampening: float = 0, weight_decay: float = 0, first: bool = False, nesterov: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """A loop over entries in float32."""
    f = np.float32
    w, g_all = weight.numpy().copy(), grad.numpy()
    v = None if velocity is None else velocity.numpy().copy()
    at = 0
    for i in np.flatnonzero(mask.numpy()):
        g = f(g_all[i] + f(f(weight_decay) * w[i]))
        move = g
        if v is not None:
            v[at] = g if first else f(f(f(momentum) * v[at]) + f(f(1 - dampening) * g))
            move = f(g + f(f(momentum) * v[at])) if nesterov else v[at]
            at += 1
        w[i] = f(w[i] - f(f(rate) * move))
    return w, v


def same(ours: Tensor | None, theirs: np.ndarray | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return bool(np.array_equal(ours.numpy().view(np.int32), theirs.view(np.int32)))


def check(run: Callable[..., None], options: dict[str, Any], size: int, density: float) -> None:
    weight, velocity, grad, mask = problem(size, density)
    given = velocity if "momentum" in options else None
    expected = by_hand(weight, given, grad, mask, **options)
    off = weight[~mask].clone()
    run(weight, given, grad, kept_bits(mask), **options)
    assert same(weight, expected[0])
    assert same(given, expected[1])
    assert torch.equal(weight[~mask], off)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_kernels(isa: str, options: dict[str, Any], size: int) -> None:
    for density in DENSITIES:
        check(masked_sgd, options, size, density)


@pytest.mark.parametrize("module", [reference, fallback])
@pytest.mark.parametrize("options", OPTIONS)
def test_reference_and_fallback_called_directly(module: Any, options: dict[str, Any]) -> None:
    def run(weight: Tensor, velocity: Tensor | None, grad: Tensor, kept: KeptBits, **o: Any) -> None:
        module.masked_sgd(
            weight, velocity, grad, kept.bits, kept.offsets, o["rate"], o.get("momentum", 0.0),
            1 - o.get("dampening", 0.0), o.get("weight_decay", 0.0), o.get("first", False), o.get("nesterov", False),
        )  # fmt: skip

    for size in (0, 65, 4097):
        check(run, options, size, 0.3)


def test_threads_change_nothing() -> None:
    weight, velocity, grad, mask = problem(300_000, 0.1)
    kept, results = kept_bits(mask), []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        w, v = weight.clone(), velocity.clone()
        masked_sgd(w, v, grad, kept, rate=0.1, momentum=0.9, weight_decay=0.01)
        results.append((w, v))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_off_the_mask_may_be_anything() -> None:
    weight, velocity, grad, mask = problem(1000, 0.4)
    weight[~mask], grad[~mask] = torch.nan, torch.inf
    masked_sgd(weight, velocity, grad, kept_bits(mask), rate=0.1, momentum=0.9, weight_decay=0.1)
    assert bool(weight[mask].isfinite().all())
    assert bool(velocity.isfinite().all())
    assert bool(weight[~mask].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight, velocity, grad, mask = problem(100, 0.5)
    expected, _ = by_hand(weight, velocity, grad, mask, rate=0.1, momentum=0.9)
    narrow = weight.to(dtype)
    masked_sgd(narrow, velocity.to(dtype), grad.to(dtype), kept_bits(mask), rate=0.1, momentum=0.9)
    torch.testing.assert_close(narrow.float(), torch.from_numpy(expected), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("with_velocity", [True, False])
def test_opcheck(with_velocity: bool) -> None:
    weight, velocity, grad, mask = problem(200, 0.5)
    kept = kept_bits(mask)
    given = velocity if with_velocity else None
    torch.library.opcheck(
        torch.ops.imgopt_fast.masked_sgd.default,
        (weight, given, grad, kept.bits, kept.offsets, 0.1, 0.9, 1.0, 0.01, False, True),
    )


def test_autograd_sees_the_change() -> None:
    weight = torch.randn(10, requires_grad=True)
    product = (weight * weight).sum()
    masked_sgd(weight, None, torch.ones(10), kept_bits(torch.ones(10, dtype=torch.bool)), rate=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_bits() -> None:
    mask = torch.rand(9000) < 0.3
    kept = kept_bits(mask)
    assert torch.equal(reference.kept_positions(kept.bits), mask.nonzero()[:, 0])
    assert kept.offsets.tolist() == [0, int(mask[:4096].sum()), int(mask[:8192].sum()), int(mask.sum())]
    assert (kept.entries, kept.kept) == (9000, int(mask.sum()))


def test_bad_input_names_the_argument() -> None:
    weight, velocity, grad, mask = problem(100, 0.5)
    kept = kept_bits(mask)
    for name, error, call in (
        ("mask", TypeError, lambda: kept_bits(mask.int())),
        ("mask", TypeError, lambda: kept_bits(mask.view(10, 10))),
        ("weight", ValueError, lambda: masked_sgd(weight[:50], velocity, grad, kept, rate=0.1)),
        ("weight", ValueError, lambda: masked_sgd(weight.expand(2, 100)[0, ::2], None, grad, kept, rate=0.1)),
        ("grad", ValueError, lambda: masked_sgd(weight, velocity, grad.view(10, 10), kept, rate=0.1)),
        ("grad", TypeError, lambda: masked_sgd(weight, velocity, grad.double(), kept, rate=0.1)),
        ("velocity", ValueError, lambda: masked_sgd(weight, grad[:3], grad, kept, rate=0.1)),
    ):
        with pytest.raises(error, match=f"^{name}: "):
            call()


@pytest.mark.skipif(_native.backend() != "native", reason="the checks of the compiled binding")
def test_the_binding_checks_memory() -> None:
    weight, velocity, grad, mask = problem(5000, 0.5)
    kept = kept_bits(mask)
    op = torch.ops.imgopt_fast.masked_sgd.default
    rest = (0.1, 0.9, 1.0, 0.0, False, False)
    for name, arguments in (
        ("velocity", (weight, velocity[1:].clone(), grad, kept.bits, kept.offsets)),
        ("grad", (weight, velocity, grad[1:], kept.bits, kept.offsets)),
        ("bits", (weight, velocity, grad, kept.bits[1:], kept.offsets)),
        ("offsets", (weight, velocity, grad, kept.bits, kept.offsets[1:])),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            op(*arguments, *rest)


def test_breaks_no_tail() -> None:
    """Entries behind the end of the weight stay what they are."""
    whole = torch.randn(200)
    before = whole.clone()
    weight = whole[:77]
    masked_sgd(weight, None, torch.randn(77), kept_bits(torch.ones(77, dtype=torch.bool)), rate=0.1)
    assert torch.equal(whole[77:], before[77:])
    assert not torch.equal(whole[:77], before[:77])


# --- the optimizer --------------------------------------------------------------------------------------------------


def network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(),
        nn.Linear(6 * 16, 7),
    )  # fmt: skip
    return model.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0, pruner: Any = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


RULES: list[dict[str, Any]] = [
    {"lr": 0.1},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.5},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_agrees_with_torch_sgd_and_the_pruner(rules: dict[str, Any], memory_format: Any) -> None:
    config = PruneConfig(sparsity=0.7, start_step=0, end_step=4, update_every=2)
    ours, theirs = network(memory_format), network(memory_format)
    optimizer = MaskedSGD(ours.parameters(), model=ours, **rules)
    reference_optimizer = torch.optim.SGD(theirs.parameters(), **rules)
    pruners = prune(ours, config, optimizer), prune(theirs, config, reference_optimizer)
    train(ours, optimizer, 8, pruner=pruners[0])
    train(theirs, reference_optimizer, 8, pruner=pruners[1])
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    for layer in pruners[0].layers.values():
        assert not layer.weight[~layer.weight_mask].any()
        assert 0.2 < layer.density() < 0.4


def test_state_is_that_of_torch_sgd() -> None:
    rules: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    model = network()
    prune(model, PruneConfig(sparsity=0.6))
    optimizer = MaskedSGD(model.parameters(), model=model, **rules)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    assert {key for entry in state["state"].values() for key in entry} == {"momentum_buffer"}
    for index, parameter in enumerate(model.parameters()):
        assert state["state"][index]["momentum_buffer"].shape == parameter.shape
    kept = model[0].weight_mask  # type: ignore[union-attr]
    assert not state["state"][0]["momentum_buffer"][~kept].any()  # type: ignore[operator]

    resumed, plain = copy.deepcopy(model), copy.deepcopy(model)
    again = MaskedSGD(resumed.parameters(), model=resumed, **rules)
    again.load_state_dict(state)
    torch_sgd = torch.optim.SGD(plain.parameters(), **rules)
    torch_sgd.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, 3, seed=1)
    train(resumed, again, 3, seed=1)
    train(plain, torch_sgd, 3, seed=1)
    for a, b, c in zip(model.parameters(), resumed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


def test_travels_with_its_model() -> None:
    model = network()
    prune(model, PruneConfig(sparsity=0.6))
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(twin, twin_optimizer, 2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_new_masks_forget_and_begin_at_zero() -> None:
    layer = MaskedLinear(6, 4, bias=False)
    optimizer = MaskedSGD(layer.parameters(), lr=1.0, momentum=0.5, model=layer)
    layer.weight.grad = torch.ones(4, 6)
    optimizer.step()
    mask = torch.rand(4, 6) < 0.5
    layer.set_mask(mask)
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], 1.5 * mask)
    layer.set_mask(torch.ones_like(mask))
    layer.weight.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], 0.75 * mask)


def test_takes_a_closure_and_refuses_bad_rates() -> None:
    layer = MaskedLinear(3, 2)
    optimizer = MaskedSGD(layer.parameters(), lr=0.1, model=layer)

    def closure() -> float:
        optimizer.zero_grad()
        loss = layer(torch.ones(1, 3)).sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == pytest.approx(closure() + 0.1 * 8)
    for name, options in {
        "lr": {"lr": -1.0}, "momentum": {"momentum": -0.1}, "weight_decay": {"weight_decay": -1.0},
        "nesterov": {"nesterov": True},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            MaskedSGD(layer.parameters(), model=layer, **options)  # type: ignore[arg-type]
