"""Pruning of models out of the ordinary: shared layers and weights, hooks, layers that are not ready, no memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast.compress import MaskedSGD, PruneConfig, pack, prune
from imgopt_fast.nn import MaskedConv2d, MaskedLinear, PackedMaskedLinear


class Shared(nn.Module):
    """One layer under two names and called twice, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.layers = nn.ModuleList([self.first, nn.Linear(24, 24), self.first])
        self.tied = nn.Linear(24, 24, bias=False)
        self.tied.weight = self.layers[1].weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        result: Tensor = self.tied(x)
        return result


def optimizers() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    return {
        "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01),
        "adamw": lambda model: torch.optim.AdamW(model.parameters(), 0.01, fused=True),
        "masked": lambda model: MaskedSGD(model.parameters(), 0.1, 0.9, weight_decay=0.01, model=model),
    }


@pytest.mark.parametrize("kind", optimizers())
@pytest.mark.parametrize(
    "options",
    [
        {"end_step": 4},
        {"method": "random"},
        {"scope": "global", "end_step": 4},
        {"end_step": 5, "update_every": 2, "regrow": "random"},
        {"end_step": 5, "update_every": 2, "regrow": "gradient"},
    ],
    ids=["ramp", "random", "global", "set", "rigl"],
)
def test_shared_layers_and_weights_have_one_mask(options: dict[str, Any], kind: str) -> None:
    model = Shared()
    optimizer = optimizers()[kind](model)
    pruner = prune(model, PruneConfig(sparsity=0.75, **options), optimizer)
    assert isinstance(model.first, MaskedLinear)
    assert model.layers[0] is model.layers[2] is model.first
    assert isinstance(model.tied, MaskedLinear)
    assert model.tied.weight is model.layers[1].weight
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(5, 24)).square().mean().backward()
        optimizer.step()
        pruner.step()
        assert torch.equal(model.tied.weight_mask, model.layers[1].weight_mask)  # type: ignore[arg-type]
        assert not model.tied.weight[~model.tied.weight_mask].any()
    assert pruner.sparsity == pytest.approx(0.75, abs=0.01)
    kept = sum(int(weight.count_nonzero()) for weight in (model.first.weight, model.tied.weight))
    assert kept == pytest.approx(0.25 * 2 * 24 * 24, abs=2)
    x = torch.randn(3, 24)
    expected = model.eval()(x)
    pack(model)
    assert model.layers[0] is model.layers[2] is model.first
    assert isinstance(model.first, PackedMaskedLinear)
    torch.testing.assert_close(model(x), expected)


def test_hooks_stay_with_their_layer() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 4))
    seen: list[str] = []
    handles = [layer.register_forward_hook(lambda *_, at=at: seen.append(at)) for at, layer in model.named_children()]
    model[2].register_full_backward_hook(lambda *_: seen.append("back"))
    prune(model, PruneConfig(sparsity=0.5))
    model(torch.randn(1, 8, 2, 2)).sum().backward()
    assert seen == ["0", "1", "2", "back"]
    pack(model.eval())
    model(torch.randn(1, 8, 2, 2))
    assert seen[4:] == ["0", "1", "2"]
    for handle in handles:
        handle.remove()
    model(torch.randn(1, 8, 2, 2))
    assert len(seen) == 7


def test_masks_that_are_there_stay() -> None:
    """A pruned network that is pruned further, on a ramp from zero, or less."""
    model = nn.Sequential(nn.Linear(40, 40))
    prune(model, PruneConfig(sparsity=0.8))
    before: Tensor = model[0].weight_mask.clone()  # type: ignore[operator, assignment]
    pruner = prune(model, PruneConfig(sparsity=0.9, start_step=1, end_step=5))
    for _ in range(6):
        pruner.step()
        assert not bool((model[0].weight_mask & ~before).any())  # type: ignore[operator]
        assert pruner.sparsity >= 0.8
    assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
    assert prune(model, PruneConfig(sparsity=0.3)).sparsity == pytest.approx(0.9, abs=1e-3)


def test_nothing_comes_back_in_the_last_step_of_dynamic_masks() -> None:
    """Every optimizer that moves weights without a gradient: here noise on all of them."""
    model = nn.Sequential(nn.Linear(20, 20))
    pruner = prune(model, PruneConfig(sparsity=0.5, end_step=4, regrow="random"))
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(20, 20))  # type: ignore[operator]
        pruner.step()
        assert not pruner.layers["0"].weight[~pruner.layers["0"].weight_mask].any()


def test_weights_of_another_optimizer_stay_zero_too() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    first = MaskedSGD(model[0].parameters(), 0.1, 0.9, model=model)
    second = torch.optim.SGD(model[1].parameters(), 0.1, 0.9, weight_decay=0.1)
    pruner = prune(model, PruneConfig(sparsity=0.5, start_step=2), first)
    for _ in range(4):
        model(torch.randn(4, 20)).square().mean().backward()
        first.step()
        second.step()
        pruner.step()
    for layer in pruner.layers.values():
        assert layer.density() == 0.5
        assert not layer.weight[~layer.weight_mask].any()


@pytest.mark.parametrize("packed", [False, True])
def test_encoder_layers_of_torch_call_their_layers(packed: bool) -> None:
    """Their fused inference would read the weights of the masked layers, all of them, and packed ones have none."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    pruner = prune(encoder, PruneConfig(sparsity=0.5))
    assert list(pruner.layers) == [f"layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)]
    expected = encoder.eval()(x)
    if packed:
        pack(encoder)
    calls: list[nn.Module] = []
    for module in encoder.modules():
        if isinstance(module, MaskedLinear | PackedMaskedLinear):
            module.register_forward_hook(lambda layer, *_: calls.append(layer))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-5)
        encoder(x, src_key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))
    assert len(calls) == 8


def test_what_cannot_take_a_mask_is_named() -> None:
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"^0: it has no weight yet; call the model on a batch first"):
        prune(lazy, PruneConfig())
    lazy(torch.randn(1, 8, 5, 5))
    assert list(prune(lazy, PruneConfig()).layers) == ["0", "2"]

    computed = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch.nn.utils.prune.l1_unstructured(computed[1], "weight", 0.5)
    with pytest.raises(ValueError, match=r"^1: .*torch.nn.utils.prune.remove.*exclude=\('1',\)"):
        prune(computed, PruneConfig())
    assert type(computed[0]) is nn.Linear, "nothing was changed"
    assert list(prune(computed, PruneConfig(exclude=("1",))).layers) == ["0"]
    torch.nn.utils.prune.remove(computed[1], "weight")
    assert list(prune(computed, PruneConfig()).layers) == ["0", "1"]

    for model in (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential()):
        with pytest.raises(ValueError, match=r"^model: nothing takes a mask"):
            prune(model, PruneConfig())
    with pytest.raises(ValueError, match=r"^model: .*wrap it in nn.Sequential"):
        prune(nn.Linear(8, 8), PruneConfig())
    with pytest.raises(TypeError, match=r"^config: "):
        prune(nn.Sequential(nn.Linear(8, 8)), {"sparsity": 0.5})  # type: ignore[arg-type]


def test_uneven_padding_stays_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 8, 2, padding="same"), nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding="valid")
    )
    assert list(prune(model, PruneConfig()).layers) == ["1", "2"]


@pytest.mark.parametrize("training", [False, True])
def test_the_meta_device(training: bool) -> None:
    """Shapes without memory, as for counting operations, or before the weights are loaded."""
    layers = (MaskedLinear(12, 7, device="meta"), MaskedConv2d(12, 7, 3, device="meta"))
    for layer, shape, expected in zip(layers, ((2, 12), (2, 12, 5, 5)), ((2, 7), (2, 7, 3, 3)), strict=True):
        layer.train(training)
        with torch.set_grad_enabled(training):
            assert layer(torch.empty(shape, device="meta")).shape == expected
        assert "density=nan" in repr(layer)
