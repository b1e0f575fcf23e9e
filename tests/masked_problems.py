"""Masks for the tests of sparse products, and what a product must come to: dense ones in float64, with a bound."""

import torch
from torch import Tensor

from imgopt_fast.ops.masked_matmul import mask_layout, masked_matmul, pack_masked_weight

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
# (samples, outputs, inputs, density): 0, 1, tile - 1, tile, tile + 1, and sizes that cross windows, blocks and panels
SIZES = [
    (1, 1, 1, 1.0), (3, 0, 4, 0.5), (3, 4, 0, 0.5), (0, 3, 4, 0.5), (5, 7, 13, 0.3), (15, 3, 129, 0.6),
    (16, 64, 128, 0.5), (17, 65, 257, 0.9), (63, 5, 1000, 0.02), (65, 130, 300, 0.2), (130, 67, 300, 0.0),
    (40, 33, 130, 1.0),
]  # fmt: skip


def random_mask(rows: int, columns: int, density: float) -> Tensor:
    return torch.rand(rows, columns) < density


STRUCTURES = ("16x16", "4x4", "16x1", "8x1", "4x1", "1:4", "2:4")


def structured_mask(name: str, density: float, size: tuple[int, int]) -> Tensor:
    """A random mask of blocks, or of N:M neighbours at their own density; cut off where the size does not fit."""
    if ":" in name:
        kept = torch.zeros(size[0], -(-size[1] // 4), 4, dtype=torch.bool)
        order = torch.rand(kept.shape).argsort(2)[..., : int(name[0])]
        return kept.scatter_(2, order, True).flatten(1)[:, : size[1]].contiguous()
    rows, columns = map(int, name.split("x"))
    blocks = random_mask(-(-size[0] // rows), -(-size[1] // columns), density)
    return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: size[0], : size[1]].contiguous()


def adversarial_masks() -> dict[str, Tensor]:
    size = (67, 300)
    one_row = torch.zeros(size, dtype=torch.bool)
    one_row[11] = True
    single = torch.zeros(size, dtype=torch.bool)
    single[66, 299] = True
    holes = random_mask(*size, 0.4)
    holes[::3], holes[:, ::5] = False, False
    blocks = random_mask(17, 300, 0.3).repeat_interleave(4, 0)[:67]
    two_of_four = torch.zeros(size, dtype=torch.bool).view(67, 75, 4)
    two_of_four[..., :2] = True
    pairs = random_mask(34, 300, 0.3).repeat_interleave(2, 0)[:67]
    return {
        "one dense row": one_row,
        "single": single,
        "diagonal": torch.eye(*size, dtype=torch.bool),
        "full": torch.ones(size, dtype=torch.bool),
        "empty": torch.zeros(size, dtype=torch.bool),
        "empty rows and columns": holes,
        "4x1 blocks": blocks,
        "2:4": two_of_four.view(size),
        **{name: structured_mask(name, 0.3, size) for name in STRUCTURES},
        "equal pairs of rows": pairs,
    }


def error_bound(absolute: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """|error| ≤ γ_n Σ|x||w| for sums of n terms in float32 (or float64), and one rounding to the dtype."""
    sums = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    n = terms + 2
    gamma = n * sums / (1 - n * sums)
    return absolute * (gamma + HALF_ULP[dtype] * (1 + gamma)) + 2.0**-24  # the least subnormal of float16


def assert_products(mask: Tensor, samples: int, dtype: torch.dtype) -> None:
    """Output and the three gradients of one random problem, each within its bound."""
    out, inputs = mask.shape
    x = torch.randn(samples, inputs).to(dtype).requires_grad_()
    w = torch.randn(out, inputs).to(dtype).requires_grad_()
    bias = torch.randn(out).to(dtype).requires_grad_()
    grad = torch.randn(samples, out).to(dtype)
    y = masked_matmul(x, w, mask_layout(mask), bias)
    grads = torch.autograd.grad(y, (x, w, bias), grad)

    x64, w64, g64, b64 = (t.detach().double() for t in (x, torch.where(mask, w, 0), grad, bias))
    most = int(max(mask.sum(0).max(), mask.sum(1).max())) if mask.numel() else 0
    kept = mask.double()
    pairs: list[tuple[str, Tensor, Tensor, Tensor, int]] = [
        ("output", y, x64 @ w64.t() + b64, x64.abs() @ w64.abs().t() + b64.abs(), most + 1),
        ("input", grads[0], g64 @ w64, g64.abs() @ w64.abs(), most),
        ("weight", grads[1], (g64.t() @ x64) * kept, (g64.abs().t() @ x64.abs()) * kept, samples),
    ]
    for name, got, expected, absolute, terms in pairs:
        assert got.dtype == dtype
        assert got.shape == expected.shape
        error = (got.detach().double() - expected).abs()
        assert bool((error <= error_bound(absolute, terms, dtype)).all()), (name, float(error.max()))
    assert torch.equal(grads[1] != 0, (grads[1] != 0) & mask)
    packed = pack_masked_weight(w.detach(), mask)
    inferred = masked_matmul(x.detach(), packed, None, bias.detach())
    if packed.dense is None:
        assert torch.equal(inferred, y.detach())
    else:  # few samples may have taken another way
        _, _, expected, absolute, terms = pairs[0]
        assert bool(((inferred.double() - expected).abs() <= error_bound(absolute, terms, dtype)).all())
