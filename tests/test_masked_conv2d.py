"""masked_conv2d against dense convolutions in float64."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from imgopt_fast.ops.masked_matmul import layout, mask_layout, masked_conv2d, pack_masked_weight

# (groups, stride, padding, dilation, kernel): every pair of axes differs
CONVOLUTIONS = [
    (1, 1, 0, 1, (1, 1)), (1, (2, 1), (1, 2), (1, 2), (3, 2)), (2, (1, 2), (2, 0), (2, 1), (2, 3)),
    (4, 3, 1, 1, (3, 3)), (16, 2, 1, 1, (3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(isa: str, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert_convolution(case, dtype)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_in_float64(case: tuple[Any, ...]) -> None:
    assert_convolution(case, torch.float64)


def assert_convolution(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    groups, stride, padding, dilation, kernel = case
    w = torch.randn(32, 16 // groups, *kernel).to(dtype).requires_grad_()
    mask = torch.rand(w.shape) < 0.4
    x = torch.randn(3, 16, 9, 7).to(dtype).requires_grad_()
    bias = torch.randn(32).to(dtype).requires_grad_()
    made = mask_layout(mask, groups=groups)
    y = masked_conv2d(x, w, made, bias, stride, padding, dilation, groups)
    x64, w64, b64 = (t.detach().double().requires_grad_() for t in (x, w, bias))
    expected = F.conv2d(x64, torch.where(mask, w64, 0), b64, stride, padding, dilation, groups)
    grad = torch.randn(y.shape).to(dtype)
    got = (y, *torch.autograd.grad(y, (x, w, bias), grad))
    oracle = (expected, *torch.autograd.grad(expected, (x64, w64, b64), grad.double()))
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for name, ours, theirs in zip(("output", "input", "weight", "bias"), got, oracle, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        ours, theirs = ours.detach(), theirs.detach()
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max()), name
    assert y.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), mock.patch.object(layout, "infers_sparse", return_value=True):
        packed = pack_masked_weight(w.detach(), mask, groups=groups)
        assert torch.equal(masked_conv2d(x, packed, None, bias, stride, padding, dilation, groups), y)
    with torch.no_grad(), mock.patch.object(layout, "infers_sparse", return_value=False):
        packed = pack_masked_weight(w.detach(), mask, groups=groups)
        ours = masked_conv2d(x, packed, None, bias, stride, padding, dilation, groups)
        assert (packed.values.dim() == 4) == (dtype == torch.float32)
        torch.testing.assert_close(ours, y.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        masked_conv2d(x, w, mask, bias, stride, padding, dilation, groups), y, rtol=2e-2, atol=0.1
    )


def test_convolution_of_few_channels_is_dense_at_inference_where_the_table_says(isa: str) -> None:
    for channels, groups, density in ((8, 1, 0.05), (64, 1, 0.1), (64, 8, 0.1), (64, 1, 1.0)):
        weight = torch.randn(64, channels // groups, 3, 3)
        mask = torch.rand(weight.shape) < density
        sparse = layout.infers_sparse(channels // groups, int(mask.sum()) / mask.numel(), isa)
        assert (pack_masked_weight(weight, mask, groups=groups).values.dim() == 1) == sparse
    assert layout.infers_sparse(4, 0.9, "scalar")
    assert layout.infers_sparse(256, 0.3, "avx512")
    assert not layout.infers_sparse(16, 0.01, "avx512")
