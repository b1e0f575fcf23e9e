"""Packed layers: the results of the masked ones, a fraction of the bytes, and the same state_dict."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from imgopt_fast.compress import PruneConfig, prune
from imgopt_fast.nn import MaskedConv2d, MaskedLinear, PackedMaskedConv2d, PackedMaskedLinear, pack
from imgopt_fast.ops.masked_matmul import layout

MASKS = ["random", "empty", "full", "one row", "diagonal", "one entry"]


def mask_of(shape: torch.Size, kind: str) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if kind == "random":
        return torch.rand(shape) < 0.3
    if kind == "full":
        return ~mask
    if kind == "one row":
        mask[len(mask) // 2] = True
    elif kind == "diagonal":
        for i in range(min(shape[:2])):
            mask[i, i] = True
    elif kind == "one entry":
        mask.view(-1)[mask.numel() // 3] = True
    return mask


def layers(kind: str) -> list[tuple[MaskedLinear | MaskedConv2d, Tensor]]:
    found: list[tuple[MaskedLinear | MaskedConv2d, Tensor]] = [
        (MaskedLinear(37, 21), torch.randn(3, 5, 37)),
        (MaskedLinear(8, 5, bias=False), torch.randn(2, 8)),
        (MaskedConv2d(6, 9, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), torch.randn(2, 6, 9, 7)),
        (MaskedConv2d(8, 12, 3, padding=1, groups=4), torch.randn(2, 8, 5, 5)),
    ]
    for layer, _ in found:
        layer.set_mask(mask_of(layer.weight.shape, kind))
        layer.eval()
    return found


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_computes_what_the_masked_layer_does_and_gives_its_weight_back(
    kind: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "infers_sparse", lambda *_: sparse)
    for layer, x in layers(kind):
        packed = pack(layer)
        assert isinstance(packed, (PackedMaskedLinear, PackedMaskedConv2d))
        with torch.no_grad():
            torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
        state = packed.state_dict()
        assert set(state) == set(layer.state_dict())
        for name, value in layer.state_dict().items():
            assert torch.equal(state[name], value), name
        copies = [copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))]
        other = pack(copy.deepcopy(layer))
        other.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
        assert not other(x).any()
        other.load_state_dict(state)
        for twin in [*copies, other]:
            assert torch.equal(twin(x), packed(x))
        assert torch.allclose(packed.double()(x.double()).float(), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for layer, x in layers("random"):
        narrow = layer.to(dtype)
        packed = pack(copy.deepcopy(narrow))
        with torch.no_grad():
            torch.testing.assert_close(packed(x.to(dtype)), narrow(x.to(dtype)), rtol=2e-2, atol=2e-2)
        for name, value in narrow.state_dict().items():
            assert torch.equal(packed.state_dict()[name], value), name


@pytest.mark.parametrize("sparse", [True, False])
def test_autocast_does_not_round_what_is_saved(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "infers_sparse", lambda *_: sparse)
    for layer, _ in layers("random"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            packed = copy.deepcopy(pack(layer))
            saved = packed.state_dict()
        assert torch.equal(saved["weight"], layer.weight)


@pytest.mark.parametrize(("sparsity", "share"), [(0.9, 0.25), (0.95, 0.15), (0.5, 0.9)])
def test_takes_little_memory(sparsity: float, share: float) -> None:
    for layer in (MaskedLinear(512, 512), MaskedConv2d(128, 128, 3)):
        layer.set_mask(torch.rand(layer.weight.shape) >= sparsity)
        dense = layer.weight.nbytes
        packed = pack(layer)
        assert isinstance(packed, (PackedMaskedLinear, PackedMaskedConv2d))
        held = sum(t.nbytes for t in [*packed.parameters(), *packed.buffers()]) - (512 if dense == 2**20 else 128) * 4
        assert held + packed.nbytes() < share * dense


def test_a_packed_network_asks_for_no_gradient() -> None:
    """So that it runs, and exports, without `torch.no_grad()`; what is put behind it learns."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 4, 16))
    prune(model, PruneConfig(sparsity=0.9))
    body, x = pack(model.eval()), torch.randn(2, 3, 6, 6)
    exported = torch.export.export(body, (x,)).module()
    torch.testing.assert_close(exported(x), body(x))
    head = nn.Linear(16, 3)
    head(body(x)).sum().backward()
    assert head.weight.grad is not None


def test_packs_a_network_in_place() -> None:
    model = nn.Sequential(MaskedConv2d(4, 6, 3), nn.ReLU(), nn.Sequential(nn.Flatten(), MaskedLinear(24, 3))).eval()
    for layer in (model[0], model[2][1]):  # type: ignore[index]
        layer.set_mask(torch.rand(layer.weight.shape) < 0.5)  # type: ignore[union-attr, arg-type, operator]
    x = torch.randn(2, 4, 4, 4)
    expected, state = model(x), model.state_dict()
    assert pack(model) is model
    assert not any(isinstance(m, (MaskedLinear, MaskedConv2d)) for m in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "of the dense bytes" in repr(model)


class Branches(nn.Module):
    """A ReLU that follows layers only, one that follows a sum too, a result that two read, clamps as functions."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(7):
            layer = MaskedLinear(6, 6)
            layer.set_mask(torch.rand(6, 6) < 0.6)
            setattr(self, f"layer{i}", layer)
        self.relu, self.other, self.twice = nn.ReLU(inplace=True), nn.ReLU(), nn.Hardtanh(-0.25, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.layer1(self.relu(self.layer0(x))))
        y = self.layer2(x)
        y = self.other(y) + y
        y = self.other(self.layer3(y))
        y = self.twice(self.layer4(y)) + self.twice(self.layer4(y.flip(0)))
        return F.relu(self.layer6(self.layer5(y).clamp(max=0.3)))


EXPECTED_LIMITS: dict[int, tuple[float | None, float | None]] = {
    0: (0, None), 1: (0, None), 2: (None, None), 3: (None, None), 4: (-0.25, 0.5), 5: (None, None), 6: (None, None)
}  # fmt: skip


@pytest.mark.parametrize("graph", [False, True])
def test_clamps_fold_into_the_layers_before_them(graph: bool) -> None:
    model: nn.Module = Branches().eval()
    x = torch.randn(64, 6)
    with torch.no_grad():
        expected = model(x)
    if graph:

        class Tracer(fx.Tracer):
            def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
                return isinstance(module, MaskedLinear) or super().is_leaf_module(module, qualified_name)

        model = fx.GraphModule(model, Tracer().trace(model))
    state = model.state_dict()
    pack(model)
    torch.testing.assert_close(model(x), expected)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    # A graph says of each call what follows it, and functions can be taken out of it.
    limits = EXPECTED_LIMITS | ({3: (0, None), 5: (None, 0.3), 6: (0, None)} if graph else {})
    layers = {i: model.get_submodule(f"layer{i}") for i in limits}
    assert {i: (layer.output_min, layer.output_max) for i, layer in layers.items()} == limits
    if not graph:
        kinds = [type(model.get_submodule(name)) for name in ("relu", "other", "twice")]
        assert kinds == [nn.Identity, nn.ReLU, nn.Identity]
    assert "in [-0.25, 0.5]" in repr(model)
    twin = pickle.loads(pickle.dumps(model.get_submodule("layer4")))
    assert (twin.output_min, twin.output_max) == (-0.25, 0.5)
    assert float(twin(10 * x).abs().max()) == 0.5


def test_a_model_that_cannot_be_traced_keeps_its_clamps() -> None:
    class Choosing(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            return output if output.sum() > 0 else -output

    model = pack(Choosing(MaskedLinear(4, 4), nn.ReLU()).eval())
    assert isinstance(model[1], nn.ReLU)  # type: ignore[index]
    assert model[0].output_min is None  # type: ignore[index]


def test_bad_state_names_what_is_wrong() -> None:
    layer = pack(MaskedLinear(6, 4))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="weight: expected shape"):
        layer.load_state_dict(state | {"weight": torch.zeros(4, 5)})
    for name in ("weight", "weight_mask", "bias"):
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
            layer.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(state | {"other": torch.zeros(1)})
