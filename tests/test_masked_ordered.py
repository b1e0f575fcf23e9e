"""The weight in the order of the kernels, which the optimizer keeps beside it: the same bits as gathered values."""

import copy
import pickle
from typing import Any

import pytest
import torch
from masked_problems import adversarial_masks, random_mask
from torch import Tensor, nn
from torch.nn import functional as F

from imgopt_fast import _native, mask_layout, masked_conv2d, masked_matmul
from imgopt_fast.compress import MaskedSGD, PruneConfig, prune
from imgopt_fast.nn import MaskedConv2d, MaskedLinear
from imgopt_fast.ops import masked_matmul as module
from imgopt_fast.ops.masked_matmul import fallback, reference
from imgopt_fast.ops.masked_sgd import Ordered, kept_bits, masked_sgd
from imgopt_fast.ops.masked_sgd import fallback as sgd_fallback
from imgopt_fast.ops.masked_sgd import reference as sgd_reference


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("name", adversarial_masks())
def test_same_bits_as_gathered(isa: str, name: str, transposed: bool) -> None:
    mask = adversarial_masks()[name]
    made, w = mask_layout(mask), torch.randn(mask.shape, requires_grad=True)
    x, bias = torch.randn(70, mask.shape[1], requires_grad=True), torch.randn(mask.shape[0], requires_grad=True)
    grad = torch.randn(70, mask.shape[0])
    results = []
    for layout in (made, made.with_values(w, transposed=transposed)):
        y = masked_matmul(x, w, layout, bias, output_min=-1.0)
        results.append((y, *torch.autograd.grad(y, (x, w, bias), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_convolution(isa: str) -> None:
    mask = torch.rand(8, 6, 3, 2) < 0.4
    made, w = mask_layout(mask, groups=2), torch.randn(8, 6, 3, 2, requires_grad=True)
    x = torch.randn(2, 12, 9, 7, requires_grad=True)
    results = []
    for layout in (made, made.with_values(w)):
        y = masked_conv2d(x, w, layout, None, (2, 1), (1, 2), (1, 2), 2)
        results.append((y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_values_are_what_is_read() -> None:
    mask, x = random_mask(20, 30, 0.4), torch.randn(5, 30, requires_grad=True)
    made, w, other = mask_layout(mask), torch.randn(20, 30), torch.randn(20, 30)
    y = masked_matmul(x, w, made.with_values(other))
    expected = masked_matmul(x, other, made)
    assert torch.equal(y, expected)
    grad = torch.randn(5, 20)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize("twin", [reference, fallback])
def test_twins(twin: Any) -> None:
    mask = random_mask(67, 300, 0.3)
    made = mask_layout(mask)
    x, w, bias = torch.randn(9, 300), torch.randn(67, 300), torch.randn(67)
    values, shape = made.with_values(w).values, [67, 300, made.block, made.transposed_block, 0]
    found = twin.masked_matmul_ordered(x, w, bias, values, None, *made[1:7], shape, [], 0.0, None)
    torch.testing.assert_close(found, F.linear(x, torch.where(mask, w, 0), bias).relu(), rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients() -> None:
    mask = random_mask(5, 7, 0.5)
    w = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    made = mask_layout(mask)

    def product(x: Tensor, w: Tensor) -> Tensor:
        return masked_matmul(x, w, made.with_values(w))

    assert torch.autograd.gradcheck(product, (x, w))
    assert torch.autograd.gradgradcheck(product, (x, w))


def test_opcheck() -> None:
    mask = random_mask(9, 20, 0.4)
    x, w = torch.randn(4, 20, requires_grad=True), torch.randn(9, 20, requires_grad=True)
    made = mask_layout(mask).with_values(w)
    shape = [9, 20, made.block, made.transposed_block, 0]
    for transposed in (made.transposed_values, None):
        arguments = (x, w, torch.randn(9), made.values, transposed, *made[1:7], shape, [], None, 6.0)
        torch.library.opcheck(module.MATMUL_ORDERED, arguments)


def test_autocast() -> None:
    mask = random_mask(8, 16, 0.3)
    x, w = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    made = mask_layout(mask)
    results = []
    for layout in (made, made.with_values(w)):
        with torch.autocast("cpu", torch.bfloat16):
            y = masked_matmul(x, w, layout)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y, (x, w), torch.ones_like(y))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- the step that writes them --------------------------------------------------------------------------------------


def orders(mask: Tensor, weight: Tensor) -> tuple[Ordered, Ordered]:
    made = mask_layout(mask).with_values(weight)
    at = mask.flatten().nonzero()[:, 0]
    found = []
    for values, source in ((made.values, made.source), (made.transposed_values, made.transposed_source)):
        place = {int(s): i for i, s in enumerate(source) if s >= 0}
        assert values is not None
        found.append(Ordered(values, torch.tensor([place[int(i)] for i in at], dtype=torch.int32)))
    return found[0], found[1]


def check_step(run: Any, rows: int, columns: int, density: float, sides: tuple[bool, bool], **options: Any) -> None:
    mask = random_mask(rows, columns, density)
    weight, grad = torch.randn(rows, columns), torch.randn(rows * columns)
    kept = kept_bits(mask.flatten())
    velocity = torch.randn(kept.kept) if "momentum" in options else None
    plain = weight.clone()
    masked_sgd(plain.view(-1), None if velocity is None else velocity.clone(), grad, kept, **options)
    forward, transposed = (o if side else None for o, side in zip(orders(mask, weight), sides, strict=True))
    run(weight.view(-1), velocity, grad, kept, forward=forward, transposed=transposed, **options)
    assert torch.equal(weight, plain)
    expected = mask_layout(mask).with_values(plain)
    for order, values in ((forward, expected.values), (transposed, expected.transposed_values)):
        assert order is None or torch.equal(order.values, values)


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("options", [{"rate": 0.1}, {"rate": 0.1, "momentum": 0.9, "nesterov": True}])
def test_step(isa: str, options: dict[str, Any], sides: tuple[bool, bool]) -> None:
    for rows, columns, density in ((1, 1, 1.0), (70, 130, 0.02), (70, 130, 0.4), (33, 64, 1.0), (9, 20, 0.0)):
        check_step(masked_sgd, rows, columns, density, sides, **options)


@pytest.mark.parametrize("twin", [sgd_reference, sgd_fallback])
def test_twins_of_the_step(twin: Any) -> None:
    def run(
        weight: Tensor, velocity: Any, grad: Tensor, kept: Any, *, rate: float, forward: Any, transposed: Any
    ) -> None:
        rest = (*(forward or (None, None)), *(transposed or (None, None)))
        twin.masked_sgd(weight, velocity, grad, kept.bits, kept.offsets, rate, 0.0, 1.0, 0.0, False, False, *rest)

    for sides in ((True, True), (False, True)):
        check_step(run, 20, 30, 0.4, sides, rate=0.1)


def test_threads_change_nothing() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_step(masked_sgd, 600, 700, 0.2, (True, True), rate=0.1, momentum=0.9)
    finally:
        torch.set_num_threads(threads)


def test_bad_orders_name_the_argument() -> None:
    mask, weight = random_mask(8, 9, 0.5), torch.randn(8, 9)
    forward, _ = orders(mask, weight)
    kept, grad = kept_bits(mask.flatten()), torch.randn(72)
    for bad in (forward._replace(places=forward.places[1:]), forward._replace(values=forward.values.double())):
        with pytest.raises(ValueError, match=r"^transposed: "):
            masked_sgd(weight.view(-1), None, grad, kept, rate=0.1, transposed=bad)


@pytest.mark.skipif(_native.backend() != "native", reason="the checks of the compiled binding")
def test_the_binding_checks_memory() -> None:
    mask, weight = random_mask(8, 9, 0.5), torch.randn(8, 9)
    forward, _ = orders(mask, weight)
    kept = kept_bits(mask.flatten())
    op = torch.ops.imgopt_fast.masked_sgd.default
    given = (weight.view(-1), None, torch.randn(72), kept.bits, kept.offsets, 0.1, 0.0, 1.0, 0.0, False, False)
    for values, places in ((forward.values, None), (forward.values, forward.places[1:]), (None, forward.places)):
        with pytest.raises(RuntimeError, match="places: expected"):
            op(*given, values, places)
    made = mask_layout(mask)
    shape = [8, 9, made.block, made.transposed_block, 0]
    for values in (forward.values[:-4], forward.values.double()):
        with pytest.raises(RuntimeError, match="values: expected"):
            module.MATMUL_ORDERED(
                torch.randn(2, 9), weight, None, values, None, *made[1:7], shape, [], None, None
            )  # fmt: skip


# --- layers and the optimizer ---------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(
        MaskedConv2d(32, 40, 3, padding=1), nn.ReLU(), MaskedConv2d(40, 32, 1), nn.Flatten(), MaskedLinear(32 * 16, 7)
    )
    for layer in masked(model):
        layer.set_mask(torch.rand(layer.weight.shape) < 0.3)
    return model


def masked(model: nn.Module) -> list[MaskedLinear | MaskedConv2d]:
    return [m for m in model.modules() if isinstance(m, MaskedLinear | MaskedConv2d)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    x = torch.randn(3, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def in_order(layer: MaskedLinear | MaskedConv2d) -> bool:
    """Whether the layer's products read values in order; they are then those of its weight, or this fails."""
    _, layout = layer._weight_and_mask(torch.zeros(()))
    assert isinstance(layout, module.MaskLayout)
    expected = layer.layout().with_values(layer.weight)
    assert layout.values is None or torch.equal(layout.values, expected.values)
    assert layout.transposed_values is None or torch.equal(layout.transposed_values, expected.transposed_values)
    return layout.values is not None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_optimizer_keeps_them(memory_format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = network().to(memory_format=memory_format)
    gathered = copy.deepcopy(kept)
    for layer in masked(gathered):
        monkeypatch.setattr(layer, "ordered", lambda: None)
    models = {name: (m, MaskedSGD(m.parameters(), 0.1, 0.9, model=m)) for name, m in (("k", kept), ("g", gathered))}
    for _ in range(4):
        assert torch.equal(step(*models["k"]), step(*models["g"]))
        assert all(in_order(layer) for layer in masked(kept))
        assert not any(in_order(layer) for layer in masked(gathered))
    first, *others = (layer.ordered() for layer in masked(kept))
    assert first is not None
    assert first.transposed_values is None  # the network's input needs no gradient
    assert all(o is not None and o.transposed_values is not None for o in others)


def test_every_other_change_is_seen() -> None:
    model = network()
    optimizer = MaskedSGD(model.parameters(), 0.1, 0.9, model=model)
    step(model, optimizer)
    layers = masked(model)
    assert all(in_order(layer) for layer in layers)
    with torch.no_grad():
        layers[0].weight.mul_(0.5)
    layers[1].set_mask(layers[1].weight_mask & (torch.rand(layers[1].weight.shape) < 0.7))
    layers[2].weight.data = layers[2].weight.data.clone()
    assert not any(in_order(layer) for layer in layers)
    step(model, optimizer)
    assert all(in_order(layer) for layer in layers)
    model.load_state_dict(network().state_dict())
    assert not any(in_order(layer) for layer in layers)
    step(model, optimizer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert not any(in_order(layer) for layer in masked(other))
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert not any(in_order(layer) for layer in layers)


def test_not_where_nothing_reads_them() -> None:
    model = network()
    layers = masked(model)
    assert all(layer.ordered() is None for layer in layers)  # before the first forward
    optimizer = MaskedSGD(model.parameters(), 0.1, model=model)
    layers[2].set_mask(torch.rand(layers[2].weight.shape) < 0.8)  # more than three fifths are kept
    step(model, optimizer)
    assert [in_order(layer) for layer in layers] == [True, True, False]


def test_a_stale_backward_is_refused() -> None:
    layer = MaskedLinear(8, 5, bias=False)
    layer.set_mask(random_mask(5, 8, 0.4))
    optimizer = MaskedSGD(layer.parameters(), 0.1, model=layer)
    x = torch.randn(2, 8, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
        optimizer.step()
    y = layer(x).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_gradual_pruning_goes_through_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = MaskedSGD(model.parameters(), 0.1, 0.9, model=model)
    pruner = prune(model, PruneConfig(sparsity=0.9, start_step=0, end_step=6, update_every=2), optimizer)
    x, used = torch.randn(16, 40), []
    for _ in range(9):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        used.append(all(in_order(layer) for layer in pruner.layers.values()))
        pruner.step()
    assert used[-1]
    assert pruner.sparsity == pytest.approx(0.9, abs=0.02)
