"""MaskedLinear and MaskedConv2d against torch's layers with masked weights, through every way a module travels."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast._mask_blocks import trains_sparse
from imgopt_fast.nn import MaskedConv2d, MaskedLinear, masked
from imgopt_fast.ops.masked_matmul import MaskLayout


def linear(density: float = 0.4) -> MaskedLinear:
    layer = MaskedLinear(20, 9)
    layer.set_mask(torch.rand(9, 20) < density)
    return layer


def conv(density: float = 0.4) -> MaskedConv2d:
    layer = MaskedConv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    layer.set_mask(torch.rand(layer.weight.shape) < density)
    return layer


LAYERS = pytest.mark.parametrize(
    ("make", "shape"), [(linear, (4, 20)), (conv, (2, 8, 9, 7))], ids=["linear", "convolution"]
)


def dense_twin(layer: MaskedLinear | MaskedConv2d) -> nn.Module:
    if isinstance(layer, MaskedLinear):
        twin: nn.Linear | nn.Conv2d = nn.Linear(20, 9)
    else:
        twin = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    with torch.no_grad():
        twin.weight.copy_(torch.where(layer.weight_mask, layer.weight, 0))
        assert twin.bias is not None
        assert layer.bias is not None
        twin.bias.copy_(layer.bias)
    return twin


@LAYERS
def test_forward_and_gradients(make, shape) -> None:
    layer = make()
    twin = dense_twin(layer)
    x = torch.randn(shape, requires_grad=True)
    ours, theirs = layer(x), twin(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    grad = torch.randn(ours.shape)
    got = torch.autograd.grad(ours, [x, *layer.parameters()], grad)
    expected = torch.autograd.grad(theirs, [x, *twin.parameters()], grad)
    names = dict(layer.named_parameters())
    assert list(names) == ["weight", "bias"]
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1] * layer.weight_mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-4, atol=1e-5)


@LAYERS
def test_from_dense_shares_parameters(make, shape) -> None:
    twin = dense_twin(make())
    kind = MaskedLinear if isinstance(twin, nn.Linear) else MaskedConv2d
    layer = kind.from_dense(twin)  # type: ignore[arg-type]
    assert layer.weight is twin.weight
    assert layer.bias is twin.bias
    torch.testing.assert_close(layer(x := torch.randn(shape)), twin(x), rtol=1e-4, atol=1e-5)


@LAYERS
def test_follows_every_change_of_the_mask(make, shape) -> None:
    layer, x = make(), torch.randn(shape)
    layer(x)
    with torch.no_grad():
        layer.weight_mask.logical_not_()  # behind the layer's back
        layer.weight.normal_()
    torch.testing.assert_close(layer(x), dense_twin(layer)(x), rtol=1e-4, atol=1e-5)
    other = make(0.7)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), other(x))


@LAYERS
def test_travels(make, shape) -> None:
    layer, x = make(), torch.randn(shape)
    expected = layer(x)
    assert set(layer.state_dict()) == {"weight", "weight_mask", "bias"}
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make(0.9)
    loaded.load_state_dict(torch.load(buffer))
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(layer)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded, average]
    for other in copies:
        torch.testing.assert_close(other(x), expected)
    wide = layer.double()
    torch.testing.assert_close(wide(x.double()).float(), expected, rtol=1e-4, atol=1e-5)


@LAYERS
def test_ema_follows_a_mask(make, shape) -> None:
    layer, x = make(), torch.randn(shape)
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    average(x)
    layer.set_mask(~layer.weight_mask)
    average.update_parameters(layer)  # the first update copies
    torch.testing.assert_close(average(x), layer(x))


def test_compiles() -> None:
    network = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), MaskedLinear(6 * 5 * 9, 3))
    x = torch.randn(2, 8, 9, 7)
    expected = network(x)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    network[0].set_mask(~network[0].weight_mask)  # type: ignore[operator, union-attr, arg-type]
    with torch.no_grad():
        network[0].weight.normal_()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(compiled(x), network(x))
    other = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), MaskedLinear(6 * 5 * 9, 3))
    network.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(x), other(x))


@pytest.mark.parametrize("sparse", [True, False])
def test_convolutions_train_as_the_table_says(monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    monkeypatch.setattr(masked, "trains_sparse", lambda *_: sparse)
    layer = conv()
    assert isinstance(layer.mask_or_layout(), MaskLayout) == sparse
    input, grad = torch.randn(2, 8, 9, 7), torch.randn(2, 6, 5, 9)
    twin = dense_twin(layer)
    layer(input).backward(grad)
    twin(input).backward(grad)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, torch.where(layer.weight_mask, twin.weight.grad, 0))


def test_few_channels_train_dense() -> None:
    assert not trains_sparse(8, 0.05, "avx512", "float32")
    assert trains_sparse(64, 0.1, "avx512", "float32")
    assert trains_sparse(64, 0.1, "avx512", "bfloat16")
    assert not trains_sparse(64, 0.2, "avx512", "bfloat16")
    assert trains_sparse(4, 0.9, "scalar", "float32")


def test_same_padding() -> None:
    dense = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
    torch.testing.assert_close(
        MaskedConv2d.from_dense(dense)(x := torch.randn(1, 4, 8, 6)), dense(x), rtol=1e-4, atol=1e-5
    )


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="padding_mode"):
        MaskedConv2d.from_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="same on both sides"):
        MaskedConv2d.from_dense(nn.Conv2d(2, 2, 2, padding="same"))
    layer = linear()
    for mask in (torch.ones(9, 20), torch.ones(9, 19, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^mask: "):
            layer.set_mask(mask)


def test_says_its_density() -> None:
    layer = linear()
    assert layer.density() == pytest.approx(float(layer.weight_mask.float().mean()))
    assert f"density={layer.density():.3f}" in repr(layer)
    assert isinstance(layer.weight_mask, Tensor)


@LAYERS
@pytest.mark.parametrize("training", [True, False])
def test_weights_and_masks_that_come_and_go_are_told_apart(make, shape, training) -> None:
    """One after the other in the same memory, with the same Python id."""
    layer, x = make().train(training), torch.randn(shape)
    with torch.no_grad():
        for _ in range(20):
            state = {"weight": torch.randn(layer.weight.shape), "weight_mask": torch.rand(layer.weight.shape) < 0.4}
            other = make()
            other.load_state_dict({**layer.state_dict(), **state})
            expected = dense_twin(other)(x)
            torch.testing.assert_close(torch.func.functional_call(layer, state, x), expected, rtol=1e-4, atol=1e-5)
            del state


@LAYERS
def test_layers_of_inference_mode(make, shape) -> None:
    with torch.inference_mode():
        layer, x = make().eval(), torch.randn(shape)
        for density in (0.2, 0.7):
            layer.set_mask(torch.rand(layer.weight.shape) < density)
            torch.testing.assert_close(layer(x), dense_twin(layer)(x), rtol=1e-4, atol=1e-5)
