"""masked_matmul of imgopt_fast.numpy against float64 and against torch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from masked_problems import random_mask

from imgopt_fast import numpy as face
from imgopt_fast.ops.masked_matmul import masked_matmul, pack_masked_weight


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numpy(dtype: str) -> None:
    mask = random_mask(67, 300, 0.3).numpy()
    rng = np.random.default_rng(0)
    x, w, bias = (rng.standard_normal(s).astype(dtype) for s in ((2, 5, 600), (67, 300), (67,)))
    x = x[..., ::2]
    expected = x.astype(np.float64) @ np.where(mask, w, 0).astype(np.float64).T
    tolerance = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-13}[dtype]
    packed = face.pack_masked_weight(w, mask)
    for ours in (face.masked_matmul(x, w, mask, bias), face.masked_matmul(x, packed, None, bias)):
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected + bias, rtol=tolerance, atol=20 * tolerance)
    np.testing.assert_allclose(face.masked_matmul(x[0, 0], packed), expected[0, 0], rtol=tolerance, atol=20 * tolerance)


def test_numpy_is_torch(isa: str) -> None:
    mask = random_mask(67, 300, 0.3)
    x, w = torch.randn(9, 300), torch.randn(67, 300)
    ours = face.masked_matmul(x.numpy(), w.numpy(), mask.numpy())
    np.testing.assert_array_equal(ours, masked_matmul(x, pack_masked_weight(w, mask)).numpy())


def test_numpy_bad_arguments() -> None:
    x, w, mask = np.zeros((2, 6), np.float32), np.zeros((4, 6), np.float32), np.ones((4, 6), bool)
    cases: list[tuple[str, type[Exception], Callable[[], object]]] = [
        ("input", TypeError, lambda: face.masked_matmul(x.astype(int), w, mask)),
        ("input", ValueError, lambda: face.masked_matmul(x[:, :5], w, mask)),
        ("weight", TypeError, lambda: face.masked_matmul(x, w.astype(np.float64), mask)),
        ("weight", ValueError, lambda: face.pack_masked_weight(w[0], mask[0])),
        ("mask", TypeError, lambda: face.masked_matmul(x, w)),
        ("mask", TypeError, lambda: face.masked_matmul(x, w, mask.astype(int))),
        ("mask", ValueError, lambda: face.masked_matmul(x, w, mask[1:])),
        ("mask", ValueError, lambda: face.masked_matmul(x, face.pack_masked_weight(w, mask), mask)),
        ("bias", ValueError, lambda: face.masked_matmul(x, w, mask, np.zeros(3, np.float32))),
        ("bias", TypeError, lambda: face.masked_matmul(x, w, mask, np.zeros(4))),
        ("input", TypeError, lambda: face.masked_matmul(x.astype(x.dtype.newbyteorder()), w, mask)),
    ]
    for name, error, call in cases:
        with pytest.raises(error, match=f"^{name}: "):
            call()
