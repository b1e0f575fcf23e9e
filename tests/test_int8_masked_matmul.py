"""int8_masked_matmul against the dense int8 convolution, bit for bit."""

import pytest
import torch
from masked_problems import random_mask

from imgopt_fast.ops.int8_conv2d import int8_conv2d, pack_int8_weight
from imgopt_fast.ops.masked_matmul import fallback, int8, int8_masked_matmul, pack_int8_masked_weight


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("kind", ["reference", "fallback"])
def test_int8_twins(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_op", int8._reference if kind == "reference" else fallback.int8_masked_matmul)
    assert_int8(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_int8(isa: str, dtype: torch.dtype) -> None:
    assert_int8(dtype)


def assert_int8(dtype: torch.dtype) -> None:
    for out, inputs, samples, extreme in [
        (1, 1, 1, False), (10, 33, 5, False), (67, 300, 65, False), (130, 1603, 130, False), (5, 1203, 17, True),
    ]:  # fmt: skip
        mask = random_mask(out, inputs, 0.4)
        weight = torch.randint(-128, 128, mask.shape, dtype=torch.int8)
        x = torch.randint(0, 256, (samples, inputs)).to(torch.uint8).view(dtype)
        if extreme:  # every product as large as it can be, of one sign in each row
            weight[:], x[:] = (
                torch.tensor([-128, 127])[torch.arange(out) % 2, None],
                255 if dtype == torch.uint8 else -128,
            )
        scale, bias = torch.rand(out) * 0.02 + 1e-3, torch.randn(out)
        zero = 100 if dtype == torch.uint8 else -7
        packed = pack_int8_masked_weight(weight, mask, scale, bias, input_scale=0.02, input_zero_point=zero)
        dense = pack_int8_weight(
            torch.where(mask, weight, 0)[:, :, None, None], scale, bias, input_scale=0.02, input_zero_point=zero
        )
        for options in (
            {},
            {"output_scale": 0.5, "output_zero_point": 11},
            {"output_scale": 0.3, "output_dtype": torch.int8, "output_min": -2.5, "output_max": 20.0},
        ):
            ours = int8_masked_matmul(x, packed, **options)  # type: ignore[arg-type]
            theirs = int8_conv2d(x[:, :, None, None], dense, **options)[:, :, 0, 0]  # type: ignore[arg-type]
            assert torch.equal(ours, theirs)
