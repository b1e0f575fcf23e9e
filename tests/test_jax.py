"""The three operations in JAX against the torch ones, and whole networks as StableHLO."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import optional
from test_onnx import Everything, Gated, Sorted, images
from torch import nn

import imgopt_fast
from imgopt_fast import export
from imgopt_fast.compress import Int8Config, PruneConfig, prune, quantize

jax = optional("jax")
jnp = jax.numpy


CASES = [
    # channels, outputs, kernel, stride, padding, dilation, groups
    (3, 8, (3, 3), 1, 1, 1, 1),
    (8, 8, (3, 3), (2, 1), ((0, 1), (2, 0)), 1, 8),
    (6, 4, (1, 5), 1, (0, 4), (1, 2), 2),
]


@pytest.mark.parametrize("requantize", ["float", "shift"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("case", CASES)
def test_int8_conv2d_has_the_same_bits(case: tuple, dtype: torch.dtype, requantize: str) -> None:
    channels, outputs, kernel, stride, padding, dilation, groups = case
    info = torch.iinfo(dtype)
    x = torch.randint(info.min, info.max + 1, (3, channels, 11, 13), dtype=dtype)
    weight = torch.randint(-128, 128, (outputs, channels // groups, *kernel), dtype=torch.int8)
    scale = 2.0 ** torch.randint(-9, -5, (outputs,)) if requantize == "shift" else torch.rand(outputs) / 50 + 1e-4
    step = 2.0**-4 if requantize == "shift" else 0.0531
    options = {"input_scale": step, "input_zero_point": int(info.min) + 77, "stride": stride, "padding": padding,
               "dilation": dilation, "groups": groups, "requantize": requantize}  # fmt: skip
    bias = torch.randn(outputs)
    shape = imgopt_fast.int8_conv2d(x, weight, bias, weight_scale=scale, **options).shape
    residual = torch.randint(info.min, info.max + 1, shape, dtype=dtype)
    arguments = (jnp.asarray(x.numpy()), weight.numpy(), bias.numpy())
    for more in (
        {},
        {"output_scale": 2.0**-2, "output_zero_point": info.min + 9},
        {"output_scale": 2.0**-1, "output_dtype": torch.uint8, "output_min": 0.0, "output_max": 30.3},
        {"output_scale": 2.0**-2, "residual_scale": 2.0**-3, "residual_zero_point": info.min + 31},
    ):
        both = {"residual": residual} if "residual_scale" in more else {}
        expected = imgopt_fast.int8_conv2d(x, weight, bias, weight_scale=scale, **options, **more, **both)
        if "output_dtype" in more:
            more = more | {"output_dtype": jnp.uint8}
        given = {name: jnp.asarray(value.numpy()) for name, value in both.items()}

        def call(x, scale=scale, more=more, given=given):
            return imgopt_fast.jax.int8_conv2d(
                x, *arguments[1:], weight_scale=scale.numpy(), **options, **more, **given
            )

        for function in (call, jax.jit(call)):
            found = np.asarray(function(arguments[0]))
            assert found.dtype == expected.numpy().dtype
            assert np.array_equal(found, expected.numpy()), more


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_affine_warp_stays_within_its_bound(interpolation: str, mode: str) -> None:
    x = torch.rand(3, 3, 17, 14)
    matrix = torch.tensor([[0.913, 0.207, -1.317], [-0.153, 1.071, 0.713], [0.0021, -0.0033, 1.0]]).repeat(3, 1, 1)
    matrix[1, 0, 2], matrix[2, 0, 0] = 40.317, float("nan")
    for m in (matrix, matrix[:, :2]):
        options = {"size": (15, 19), "interpolation": interpolation, "padding_mode": mode, "fill": [0.1, 0.2, 0.3]}
        norm = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
        expected = imgopt_fast.affine_warp(x, m, **options, **norm)
        found = imgopt_fast.jax.affine_warp(jnp.asarray(x.numpy()), jnp.asarray(m.numpy()), **options, **norm)
        # 2^-23 of coordinates below 64 moves a sample by 8e-6 of a pixel; over std 0.2 with bicubic slopes below 2.
        distance = np.abs(np.asarray(found) - expected.numpy())
        if interpolation == "nearest":  # another pixel where the coordinate lies between two
            assert (distance > 1e-6).mean() < 0.02
        else:
            assert distance.max() < (1e-3 if interpolation == "bicubic" else 2e-4)
    levels = (x * 255).to(torch.uint8)
    table = torch.randint(0, 256, (1, 3, 256), dtype=torch.uint8)
    color = torch.randn(3, 3, 4) / 3 + torch.eye(3, 4)
    options |= {"fill": 7}
    expected = imgopt_fast.affine_warp(levels, m, **options, table=table, color_matrix=color)
    found = imgopt_fast.jax.affine_warp(
        *(jnp.asarray(t.numpy()) for t in (levels, m)), **options, table=jnp.asarray(table.numpy()),
        color_matrix=jnp.asarray(color.numpy()),
    )  # fmt: skip
    distance = np.abs(np.asarray(found).astype(int) - expected.numpy().astype(int))
    assert distance.max() <= 1 or interpolation == "nearest"
    assert (distance > 0).mean() < 0.02


def test_affine_warp_has_gradients() -> None:
    x = torch.rand(2, 2, 9, 8, requires_grad=True)
    m = torch.tensor([[[0.913, 0.207, 0.317], [-0.103, 1.071, 0.413]]] * 2)
    m.requires_grad_()
    weight = torch.randn(2, 2, 9, 8)
    (imgopt_fast.affine_warp(x, m) * weight).sum().backward()

    def loss(x, m):
        return (imgopt_fast.jax.affine_warp(x, m) * weight.numpy()).sum()

    found = jax.grad(loss, (0, 1))(*(jnp.asarray(t.detach().numpy()) for t in (x, m)))
    for gradient, t in zip(found, (x, m), strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(gradient)), t.grad, rtol=1e-4, atol=1e-4)


def test_masked_matmul_and_its_gradients() -> None:
    x, w, b = torch.randn(2, 5, 40), torch.randn(7, 40), torch.randn(7)
    mask = torch.rand(7, 40) < 0.2
    leaves = [t.requires_grad_() for t in (x, w, b)]
    expected = imgopt_fast.masked_matmul(x, w, imgopt_fast.mask_layout(mask), b)
    expected.square().sum().backward()

    def call(x, w, b):
        return imgopt_fast.jax.masked_matmul(x, w, jnp.asarray(mask.numpy()), b)

    given = [jnp.asarray(t.detach().numpy()) for t in leaves]
    bound = 40 * 2.0**-23 * (F.linear(x.abs(), torch.where(mask, w.abs(), 0)) + b.abs()).detach().numpy()
    assert (np.abs(np.asarray(jax.jit(call)(*given)) - expected.detach().numpy()) <= bound).all()
    found = jax.grad(lambda *a: (call(*a) ** 2).sum(), (0, 1, 2))(*given)
    for gradient, t in zip(found, leaves, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(gradient)), t.grad, rtol=1e-4, atol=1e-4)
    assert not np.asarray(found[1])[~mask.numpy()].any()


def test_errors_name_the_argument() -> None:
    x = jnp.zeros((1, 3, 4, 4), jnp.float32)
    with pytest.raises(TypeError, match="input"):
        imgopt_fast.jax.int8_conv2d(x, np.zeros((2, 3, 1, 1), np.int8), input_scale=1.0, weight_scale=1.0)
    with pytest.raises(ValueError, match="matrix"):
        imgopt_fast.jax.affine_warp(x, jnp.zeros((1, 3, 2)))
    with pytest.raises(ValueError, match="mask"):
        imgopt_fast.jax.masked_matmul(x, jnp.zeros((2, 4)), jnp.zeros((2, 3), bool))


@pytest.mark.parametrize(
    ("network", "power_of_two"), [("everything", False), ("everything", True), ("inverted", False)]
)
def test_networks_run_in_xla_bit_by_bit(
    network: str, power_of_two: bool, tmp_path: Path, inverted_bottlenecks: nn.Module
) -> None:
    x = images(8, 3, 14, 12) if network == "everything" else images(8, 3, 24, 24)
    model = quantize(
        Everything().eval() if network == "everything" else inverted_bottlenecks,
        [x],
        Int8Config(power_of_two=power_of_two),
    )
    report = export(model, "stablehlo", tmp_path / "net", images=x, labels=model(x).argmax(1))
    assert report.checks[0].outputs == "bit-equal"
    assert report.checks[0].accuracy == 1.0
    from jax import export as jax_export

    stored = jax_export.deserialize(bytearray((tmp_path / "net" / "network.jax_export").read_bytes()))
    assert stored.platforms == ("tpu", "cuda", "cpu")
    for n in (1, 3):  # the batch is free
        assert np.array_equal(np.asarray(jax.jit(stored.call)(x[:n].numpy())), model(x[:n]).numpy())
    assert (tmp_path / "net" / "network.mlirbc").read_bytes()[:4] == b"ML\xefR"


def test_float_networks_go_too(tmp_path: Path) -> None:
    x = images(4, 3, 20, 20)
    pruned = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(648, 5)).eval()
    prune(pruned, PruneConfig(sparsity=0.8, end_step=1)).step()
    for model in (pruned, Gated().eval(), quantize(Gated().eval(), [x])):
        report = export(model, "stablehlo", tmp_path / "net", images=x)
        assert all(d.largest < 0.02 for d in report.checks[0].differences)


def test_a_layer_without_jax_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cumsum.*stablehlo cannot carry it.*--format pt2"):
        export(quantize(Sorted().eval(), [images(2, 3, 8, 8)]), "stablehlo", tmp_path / "net")
    assert list(tmp_path.iterdir()) == []
