"""Sparse products and their gradients on CUDA, in every form that a mask is given, against float64."""

from unittest.mock import patch

import conv_problems
import masked_problems
import numpy as np
import pytest
import torch
from cuda_device import EMULATED

import imgopt_fast
from imgopt_fast.ops import masked_matmul as masked_module
from imgopt_fast.ops.masked_matmul import cuda as masked_cuda
from imgopt_fast.ops.masked_matmul import cuda_packed, mask_layout


def masked_problem(
    device: torch.device, mask: torch.Tensor, samples: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of the operation itself, whatever `choose` would do, and their float64 references."""
    out, inputs = mask.shape
    with patch.dict(masked_cuda.LARGEST_DENSITY, {("quads", torch.float32): 1.0}):  # else a GPU's layout has none
        layout = mask_layout(mask.to(device))
    operands = [torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)]
    leaves = [t.to(device, dtype).requires_grad_() for t in operands]
    shape = [out, inputs, layout.block, layout.transposed_block, 0]
    found = masked_module.MATMUL(*leaves, *layout[1:7], shape, [], None, None)
    grad = torch.randn(samples, out).to(dtype)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    x, w, b = (t.detach().cpu().double() for t in leaves)
    g, kept = grad.double(), torch.where(mask, w, 0)
    expected = [x @ kept.t() + b, g @ kept, torch.where(mask, g.t() @ x, 0), g.sum(0)]
    return [found.detach(), *gradients], expected


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    step = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for actual, wanted in zip(found, expected, strict=True):
        scale = float(wanted.abs().max()) if wanted.numel() else 1.0
        torch.testing.assert_close(actual.cpu().double(), wanted, rtol=step, atol=step * max(1.0, scale))


@pytest.fixture(params=[128, 0], ids=["tiled", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Columns per block: what CUDA's table says, and all of them, which shared memory does not hold."""

    def choice(mask: np.ndarray, isa: str | None) -> int:
        return max(1, min(request.param or mask.shape[1], mask.shape[1]))

    monkeypatch.setattr("imgopt_fast.ops.masked_matmul.layout.block_columns", choice)
    return int(request.param)


@pytest.mark.parametrize("size", masked_problems.SIZES, ids=str)
def test_masked_matmul(device: torch.device, block: int, size: tuple[int, int, int, float]) -> None:
    samples, out, inputs, density = size
    mask = masked_problems.random_mask(out, inputs, density)
    assert_near(*masked_problem(device, mask, samples, torch.float32), torch.float32)


@pytest.mark.parametrize("name", masked_problems.adversarial_masks())
def test_masked_matmul_of_adversarial_masks(device: torch.device, block: int, name: str) -> None:
    mask = masked_problems.adversarial_masks()[name]
    assert_near(*masked_problem(device, mask, 33, torch.float32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_masked_matmul_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    found, expected = masked_problem(device, masked_problems.random_mask(70, 300, 0.3), 67, dtype)
    assert_near(found, expected, dtype)


@pytest.mark.parametrize("stride", [1, 2])
def test_masked_conv2d(device: torch.device, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # dense forms are torch's: 2e-5 is float32's
    mask = masked_problems.random_mask(24, 3 * 3 * 8, 0.15).view(24, 8, 3, 3)
    x, w = torch.randn(2, 16, 9, 11), torch.randn(24, 8, 3, 3)
    leaves = [x.to(device).requires_grad_(), w.to(device).requires_grad_()]
    layout = mask_layout(mask.to(device), groups=2)
    found = imgopt_fast.masked_conv2d(*leaves, layout, stride=stride, padding=1, groups=2)
    grad = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    doubles = [x.double().requires_grad_(), w.double().requires_grad_()]
    kept = torch.where(mask, doubles[1], 0)
    expected = torch.nn.functional.conv2d(doubles[0], kept, stride=stride, padding=1, groups=2)
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    assert_near([found.detach(), *gradients], [expected.detach(), *wanted], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 16, 16), (130, 400, 208), (257, 48, 592)])
def test_block_matmul(device: torch.device, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    samples, out, inputs = size
    mask = masked_problems.random_mask(out // 16, inputs // 16, 0.4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    bits = masked_cuda.block_bits(mask.to(device))
    assert bits is not None
    operands = [torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)]
    leaves = [t.to(device, dtype).requires_grad_() for t in operands]
    found = masked_cuda.block_matmul(*leaves, *bits)
    grad = torch.randn(samples, out).to(dtype)
    gradients = torch.autograd.grad(found, leaves, grad.to(device))
    x, w, b = (t.detach().cpu().double() for t in leaves)
    g, kept = grad.double(), torch.where(mask, w, 0)
    expected = [x @ kept.t() + b, g @ kept, torch.where(mask, g.t() @ x, 0), g.sum(0)]
    assert_near([found.detach(), *gradients], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "size", "density"),
    [(16, (1, 16, 16), 1.0), (16, (130, 400, 208), 0.4), (16, (300, 816, 592), 0.05), (16, (70, 784, 80), 1.0),
     (32, (200, 832, 160), 0.3), (32, (129, 64, 96), 1.0), (32, (70, 64, 64), 0.0)],
)  # fmt: skip
def test_packed_block_matmul(
    device: torch.device, side: int, size: tuple[int, int, int], density: float, dtype: torch.dtype
) -> None:
    if not EMULATED and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("expected compute capability 9.0")
    samples, out, inputs = size
    blocks = masked_problems.random_mask(out // side, inputs // side, density)
    mask = blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)
    x, w, b = (t.to(dtype) for t in (torch.randn(samples, inputs), torch.randn(out, inputs), torch.randn(out)))
    packed = cuda_packed.pack_blocks(w.to(device), mask.to(device))
    assert packed[0].shape == (int(blocks.sum()), side, side)
    torch.testing.assert_close(cuda_packed.unpack_blocks(*packed, out, inputs).cpu(), torch.where(mask, w, 0))
    expected = x.double() @ torch.where(mask, w, 0).double().t()
    for bias in (b, None):
        there = None if bias is None else bias.to(device)
        found = cuda_packed.packed_block_matmul(x.to(device), packed[0], there, *packed[1:], out)
        assert_near([found], [expected if bias is None else expected + b.double()], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["random", "sparse", "blocks", "2:4"])
def test_masked_layers_choose_a_form(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """The public functions, with whatever form the table gives the mask."""
    mask = masked_problems.random_mask(128, 192, 0.01 if kind == "sparse" else 0.5)
    if kind == "blocks":
        mask = masked_problems.random_mask(8, 12, 0.1).repeat_interleave(16, 0).repeat_interleave(16, 1)
    if kind == "2:4":
        mask = torch.tensor([True, False, False, True]).repeat(128, 48)
    x, w, b = (t.to(dtype) for t in (torch.randn(64, 192), torch.randn(128, 192), torch.randn(128)))
    expected = x.double() @ torch.where(mask, w, 0).double().t() + b.double()
    on_device = [t.to(device) for t in (x, w, mask, b)]
    trained = imgopt_fast.masked_matmul(on_device[0], on_device[1], mask_layout(on_device[2]), on_device[3])
    packed = imgopt_fast.pack_masked_weight(on_device[1], on_device[2])
    with torch.no_grad():
        inferred = imgopt_fast.masked_matmul(on_device[0], packed, None, on_device[3])
    assert_near([trained, inferred], [expected, expected], dtype)


@pytest.mark.parametrize("output_dtype", [torch.uint8, torch.int8, None])
@pytest.mark.parametrize("dtype", conv_problems.DTYPES)
def test_int8_masked_matmul_is_exact(
    device: torch.device, dtype: torch.dtype, output_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgopt_fast.ops.masked_matmul.int8.GROUP", 1)  # the device's format where it is emulated
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (35, 300)).to(dtype)
    weight, mask = torch.randint(-128, 128, (67, 300), dtype=torch.int8), masked_problems.random_mask(67, 300, 0.2)
    scale, bias = torch.rand(67) * 0.01 + 0.001, torch.randn(67)
    options = {} if output_dtype is None else {"output_scale": 0.9, "output_zero_point": 3, "output_min": -20.0}
    settings = {"input_scale": 0.05, "input_zero_point": 7}
    layer = masked_module.pack_int8_masked_weight(
        weight.to(device), mask.to(device), scale.to(device), bias.to(device), **settings
    )
    found = masked_module.int8_masked_matmul(x.to(device), layer, output_dtype=output_dtype, **options)
    dense = torch.where(mask, weight, 0)[:, :, None, None]
    expected = conv_problems.oracle(
        x[:, :, None, None], dense, bias, weight_scale=scale, output_dtype=output_dtype, **settings, **options
    )
    np.testing.assert_array_equal(found.cpu().numpy(), expected[:, :, 0, 0])
