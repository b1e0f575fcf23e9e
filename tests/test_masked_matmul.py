"""masked_matmul against dense products in float64: every instruction set, dtype, adversarial mask and gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import neon_units
import pytest
import torch
import torch.nn.functional as F
from masked_problems import SIZES, adversarial_masks, assert_products, error_bound, random_mask
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast.ops import masked_matmul as module
from imgopt_fast.ops.masked_matmul import (
    fallback,
    int8_masked_matmul,
    layout,
    mask_layout,
    masked_conv2d,
    masked_matmul,
    pack_int8_masked_weight,
    pack_masked_weight,
    reference,
)

# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_products(
    isa: str, size: tuple[int, int, int, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_dense_in_bfloat16", lambda mask: False)
    samples, out, inputs, density = size
    assert_products(random_mask(out, inputs, density), samples, dtype)


def test_products_of_adversarial_masks(isa: str) -> None:
    for mask in adversarial_masks().values():
        assert_products(mask, 66, torch.float32)


@pytest.mark.parametrize("block", [1, 128, 100000])
def test_products_for_any_block(isa: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "block_columns", lambda mask, isa: min(block, mask.shape[1]))
    assert_products(random_mask(70, 300, 0.3), 20, torch.float32)


@pytest.mark.parametrize("size", SIZES)
def test_products_in_float64(size: tuple[int, int, int, float]) -> None:
    samples, out, inputs, density = size
    assert_products(random_mask(out, inputs, density), samples, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_samples_of_a_dense_copy(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "keeps_dense_copy", lambda density, isa: True)
    monkeypatch.setattr(layout, "_dense_in_bfloat16", lambda mask: False)
    for out, inputs in ((1, 1), (5, 16), (67, 300), (64, 33), (130, 129)):
        mask = random_mask(out, inputs, 0.8)
        w, bias = torch.randn(out, inputs).to(dtype), torch.randn(out).to(dtype)
        packed = pack_masked_weight(w, mask)
        assert packed.dense is not None
        kept = torch.where(mask, w, 0).double()
        for samples in (1, 3, 4, 5, 65):
            x = torch.randn(samples, inputs).to(dtype)
            y = masked_matmul(x, packed, None, bias).double()
            expected = x.double() @ kept.t() + bias.double()
            absolute = x.double().abs() @ kept.abs().t() + bias.double().abs()
            assert bool(((y - expected).abs() <= error_bound(absolute, inputs + 1, dtype)).all())


def test_dense_copy_is_kept_where_the_table_says() -> None:
    w = torch.randn(64, 64)
    assert pack_masked_weight(w, random_mask(64, 64, 0.1)).dense is None
    expected = layout.keeps_dense_copy(1.0, _native.active_isa())
    assert (pack_masked_weight(w, torch.ones(64, 64, dtype=torch.bool)).dense is not None) == expected


def test_dense_product_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_dense_in_bfloat16", lambda mask: True)
    mask, w, x = random_mask(20, 30, 0.7), torch.randn(20, 30), torch.randn(4, 30)
    low = pack_masked_weight(w.bfloat16(), mask)
    assert low.values.shape == (20, 30)
    assert pack_masked_weight(w, mask).values.dim() == 1
    expected = (x.bfloat16().float() @ (w.bfloat16() * mask).float().t()).relu()
    made = mask_layout(mask)
    found = masked_matmul(x.bfloat16(), low, output_min=0.0)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    weight = w.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        trained = masked_matmul(x, weight, made, output_min=0.0)
    torch.testing.assert_close(trained.float(), expected, rtol=1e-2, atol=1e-2)
    trained.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad != 0, mask & (weight.grad != 0))


def test_bfloat16_is_dense_where_the_table_says() -> None:
    supported = torch.cpu._is_avx512_bf16_supported()
    for density in (0.05, 1.0):
        mask = random_mask(64, 64, density)
        expected = supported and layout.dense_in_bfloat16(float(mask.float().mean()), _native.active_isa())
        assert mask_layout(mask).dense_in_bfloat16 == expected
        assert (pack_masked_weight(torch.randn(64, 64).bfloat16(), mask).values.dim() == 2) == expected


LIMITS: list[dict[str, float]] = [{"output_min": 0.0}, {"output_min": 0.0, "output_max": 6.0}, {"output_max": -0.5}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limits", LIMITS)
def test_clamping(isa: str, limits: dict[str, float], dtype: torch.dtype) -> None:
    """The clamped result is that of clamping the other, and no gradient passes where it was clamped."""
    mask = random_mask(67, 300, 0.2)
    w = torch.randn(67, 300).to(dtype).requires_grad_()
    bias = torch.randn(67).to(dtype).requires_grad_()
    made, low, high = mask_layout(mask), limits.get("output_min"), limits.get("output_max")
    for samples in (1, 5, 65):
        x = torch.randn(samples, 300).to(dtype).requires_grad_()
        clamped, grad = masked_matmul(x, w, made, bias, **limits), torch.randn(samples, 67).to(dtype)
        bounds = -float("inf") if low is None else low, float("inf") if high is None else high
        expected = F.hardtanh(masked_matmul(x, w, made, bias), *bounds)
        assert torch.equal(clamped, expected)
        for ours, theirs in zip(
            torch.autograd.grad(clamped, (x, w, bias), grad), torch.autograd.grad(expected, (x, w, bias), grad),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(ours, theirs)
        packed = pack_masked_weight(w.detach(), mask)
        assert torch.equal(masked_matmul(x.detach(), packed, None, bias.detach(), **limits), clamped)
        torch.testing.assert_close(masked_matmul(x, w, mask, bias, **limits), clamped, rtol=2e-2, atol=0.1)
    image, conv = torch.randn(2, 30, 5, 4).to(dtype), w.detach()[:, :270].reshape(67, 30, 3, 3)
    conv_mask = mask[:, :270].reshape(67, 30, 3, 3)
    found = masked_conv2d(image, conv, mask_layout(conv_mask), None, 2, 1, **limits)
    assert torch.equal(found, masked_conv2d(image, conv, mask_layout(conv_mask), None, 2, 1).clamp(low, high))


@pytest.mark.parametrize("twin", [reference, fallback])
def test_twins(twin: Any) -> None:
    mask = random_mask(67, 300, 0.3)
    made = mask_layout(mask)
    x, w, g, bias = torch.randn(9, 300), torch.randn(67, 300), torch.randn(9, 67), torch.randn(67)
    shape = [67, 300, made.block, made.transposed_block, 0]
    kept = torch.where(mask, w, 0).double()
    expected = x.double() @ kept.t() + bias.double()
    for limits in ((None, None), (0.0, None), (-1.0, 1.0)):
        y = twin.masked_matmul(x, w, bias, *made[1:7], shape, [], *limits)
        clamped = expected if limits == (None, None) else expected.clamp(*limits)
        torch.testing.assert_close(y.double(), clamped, rtol=1e-4, atol=1e-4)
    grad = twin.masked_matmul_weight_grad(x, g, *made[1:7], shape, [], [67, 300])
    torch.testing.assert_close(grad.double(), (g.double().t() @ x.double()) * mask, rtol=1e-4, atol=1e-4)


def test_masked_means_absent() -> None:
    mask = random_mask(9, 20, 0.5)
    w = torch.where(mask, torch.randn(9, 20), float("nan"))
    x = torch.randn(4, 20)
    expected = x @ torch.where(mask, w, 0).t()
    for form in (mask, mask_layout(mask)):
        torch.testing.assert_close(masked_matmul(x, w, form), expected)
    torch.testing.assert_close(masked_matmul(x, pack_masked_weight(w, mask)), expected)


def test_layouts_of_memory() -> None:
    """Transposed, expanded and sliced inputs, weights and gradients; any leading dimensions."""
    mask = random_mask(12, 20, 0.5)
    made = mask_layout(mask)
    w = torch.randn(20, 12).t().requires_grad_()
    kept = torch.where(mask, w, 0)
    inputs = [torch.randn(20, 5).t(), torch.randn(1, 20).expand(5, 20), torch.randn(5, 40)[:, ::2], torch.randn(20),
              torch.randn(2, 3, 20)]  # fmt: skip
    for x in inputs:
        y = masked_matmul(x, w, made)
        torch.testing.assert_close(y, x @ kept.t())
        grad = torch.randn(y.shape[-1:]).expand(y.shape)
        torch.testing.assert_close(
            torch.autograd.grad(y, w, grad)[0], torch.autograd.grad(x @ kept.t(), w, grad, retain_graph=True)[0]
        )
    image = torch.randn(2, 6, 5, 16).permute(0, 3, 1, 2)[:, ::2]
    conv_mask = torch.rand(4, 8, 3, 3) < 0.5
    weight = torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(
        masked_conv2d(image, weight, mask_layout(conv_mask)), F.conv2d(image, weight * conv_mask), rtol=1e-4, atol=1e-5
    )


def test_bit_equal_over_thread_counts(isa: str) -> None:
    mask = torch.rand(300, 40, 3, 3) < 0.2
    w, x = torch.randn(mask.shape, requires_grad=True), torch.randn(5, 40, 14, 14, requires_grad=True)
    grad, made = torch.randn(5, 300, 12, 12), mask_layout(mask)  # eleven panels and a quarter

    def products() -> list[Tensor]:
        y = masked_conv2d(x, w, made)
        return [y.detach(), *torch.autograd.grad(y, (x, w), grad)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = products()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(single, products(), strict=True))
    finally:
        torch.set_num_threads(before)


# --- autograd, dispatcher, compiler ----------------------------------------------------------------------------------


def test_gradcheck() -> None:
    mask = random_mask(5, 9, 0.5)
    made = mask_layout(mask)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 9), (5, 9), (5,)))
    function: Callable[..., Tensor] = lambda x, w, b: masked_matmul(x, w, made, b)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w, b))
    assert torch.autograd.gradgradcheck(function, (x, w, b))
    clamped: Callable[..., Tensor] = lambda x, w, b: masked_matmul(x, w, made, b, output_min=0.0, output_max=1.5)  # noqa: E731
    assert torch.autograd.gradcheck(clamped, (x, w, b))
    assert torch.autograd.gradgradcheck(clamped, (x, w, b))


def test_gradcheck_of_a_convolution() -> None:
    mask = torch.rand(4, 2, 2, 3) < 0.6
    made = mask_layout(mask, groups=2)
    x = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    function: Callable[..., Tensor] = lambda x, w: masked_conv2d(x, w, made, None, (2, 1), 1, 1, 2)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, w))
    assert torch.autograd.gradgradcheck(function, (x, w))


def test_mask_may_change_between_forward_and_backward() -> None:
    mask = random_mask(6, 10, 0.5)
    x, w = torch.randn(4, 10), torch.randn(6, 10, requires_grad=True)
    y = masked_matmul(x, w, mask_layout(mask))
    kept = mask.clone()
    mask.logical_not_()
    y.sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad != 0, kept)


def test_autocast() -> None:
    mask = random_mask(8, 16, 0.5)
    made = mask_layout(mask)
    x, w = torch.randn(4, 16), torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_matmul(x, w, made, torch.randn(8))
        assert y.dtype == torch.bfloat16
        assert masked_matmul(x, pack_masked_weight(w, mask)).dtype == torch.bfloat16
        assert masked_matmul(x.double(), w.double(), made).dtype == torch.float64
    y.sum().backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch 2.14's opcheck looks at one
def test_opcheck() -> None:
    mask = random_mask(9, 20, 0.4)
    made = mask_layout(mask)
    shape = [9, 20, made.block, made.transposed_block, 0]
    x, w, b = torch.randn(4, 20, requires_grad=True), torch.randn(9, 20, requires_grad=True), torch.randn(9)
    torch.library.opcheck(module.MATMUL, (x, w, b, *made[1:7], shape, [], None, 6.0))
    torch.library.opcheck(module.WEIGHT_GRAD, (x, torch.randn(4, 9), *made[1:7], shape, [], [9, 20]))
    packed = pack_masked_weight(w.detach(), mask)
    for dense in (None, torch.where(mask, w.detach(), 0)):
        torch.library.opcheck(
            module.MATMUL_PACKED,
            (x.detach(), packed.values, None, packed.quads, packed.columns, dense, shape[:3], [], 0.0, None),
        )
    image = torch.randn(2, 20, 5, 4, requires_grad=True)
    window = [3, 6, 1, 1, 2, 1, -1, -1, 1, 1, 1, 1]
    torch.library.opcheck(module.MATMUL, (image, w, None, *made[1:7], shape, window, None, None))


def test_compile_and_export() -> None:
    mask = torch.rand(8, 6, 3, 3) < 0.4
    made = mask_layout(mask)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(8, 6, 3, 3))
            self.packed = pack_masked_weight(torch.randn(5, 8), random_mask(5, 8, 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = masked_conv2d(x, self.weight, made, None, 1, 1)
            return masked_matmul(y.mean((2, 3)).detach(), self.packed)

    network, x = Network(), torch.randn(3, 6, 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    torch.testing.assert_close(compiled(x[:2]), network(x[:2]))
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(network, (x,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(x[:2]), network(x[:2]))


# --- other instruction sets ------------------------------------------------------------------------------------------


def test_neon_unit_in_an_emulator(tmp_path: Path) -> None:
    assert neon_units.compared("masked_matmul", tmp_path) == "52 cases, 0 differ\n"


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    x, w, mask = torch.randn(2, 6), torch.randn(4, 6), random_mask(4, 6, 0.5)
    made, packed = mask_layout(mask), pack_masked_weight(w, mask)
    image, conv_mask = torch.randn(1, 6, 5, 5), torch.ones(4, 3, 3, 3, dtype=torch.bool)
    conv_w = torch.randn(4, 3, 3, 3)
    cases: list[tuple[str, type[Exception], Callable[[], object]]] = [
        ("input", TypeError, lambda: masked_matmul(x.int(), w, made)),
        ("input", ValueError, lambda: masked_matmul(x[:, :5], w, made)),
        ("input", ValueError, lambda: masked_matmul(torch.tensor(1.0), w, made)),
        ("weight", TypeError, lambda: masked_matmul(x, w.double(), made)),
        ("weight", TypeError, lambda: masked_matmul(x, [1.0], made)),  # type: ignore[arg-type]
        ("weight", ValueError, lambda: masked_matmul(x, conv_w, mask_layout(conv_mask))),
        ("mask", TypeError, lambda: masked_matmul(x, w)),
        ("mask", TypeError, lambda: masked_matmul(x, w, mask.float())),
        ("mask", ValueError, lambda: masked_matmul(x, w, mask[:3])),
        ("mask", ValueError, lambda: masked_matmul(x, w[:3], made)),
        ("mask", ValueError, lambda: masked_matmul(x, packed, mask)),
        ("bias", ValueError, lambda: masked_matmul(x, w, made, torch.randn(3))),
        ("bias", TypeError, lambda: masked_matmul(x, w, made, torch.randn(4).double())),
        ("input", ValueError, lambda: masked_matmul(x.clone().requires_grad_(), packed)),
        ("mask", TypeError, lambda: mask_layout(mask.float())),
        ("mask", ValueError, lambda: mask_layout(mask[0])),
        ("groups", ValueError, lambda: mask_layout(conv_mask, groups=3)),
        ("weight", TypeError, lambda: pack_masked_weight(w.int(), mask)),
        ("mask", ValueError, lambda: pack_masked_weight(w, mask[:2])),
        ("groups", ValueError, lambda: masked_conv2d(image, conv_w, mask_layout(conv_mask), groups=2)),
        ("input", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask)),
        ("input", ValueError, lambda: masked_conv2d(image[:, :, :2], conv_w, conv_mask, groups=2)),
        ("stride", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, stride=0, groups=2)),
        ("stride", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, stride=1.5, groups=2)),  # type: ignore[arg-type]
        ("groups", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, groups=None)),  # type: ignore[arg-type]
        ("padding", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, padding=-1, groups=2)),
        ("padding", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, padding="same", groups=2)),  # type: ignore[arg-type]
        ("dilation", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, dilation=(1, 2, 3), groups=2)),  # type: ignore[arg-type]
        ("output_min", ValueError, lambda: masked_matmul(x, w, made, output_min=2.0, output_max=1.0)),
        ("output_min", ValueError, lambda: masked_matmul(x, w, made, output_min="0")),  # type: ignore[arg-type]
        ("output_max", ValueError, lambda: masked_conv2d(image, conv_w, conv_mask, groups=2, output_max=float("nan"))),
        ("weight", TypeError, lambda: int8_masked_matmul(x.byte(), w)),  # type: ignore[arg-type]
        ("weight", TypeError, lambda: pack_int8_masked_weight(w, mask, 0.1, input_scale=0.1)),
    ]
    for name, error, call in cases:
        with pytest.raises(error, match=f"^{name}: "):
            call()
