"""Gradients of affine_warp: against finite differences, autograd through the reference, and themselves."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKEND
from warp_problems import backward_op, homography, layout, random_images, rotation

from imgopt_fast import _native, affine_warp
from imgopt_fast.ops.affine_warp import INTERPOLATIONS, PADDING_MODES, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("rows", [2, 3])
def test_gradcheck(interpolation: str, padding_mode: str, rows: int) -> None:
    images = torch.rand(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    matrix = (rotation if rows == 2 else homography)(2, 5, 6).requires_grad_()
    colors = torch.rand(2, 3, 4, dtype=torch.float64) * 0.6 - 0.1
    options: dict[str, Any] = {
        "size": (4, 7), "interpolation": interpolation, "padding_mode": padding_mode, "fill": [0.2, 0.4, 0.6],
    }  # fmt: skip
    assert torch.autograd.gradcheck(lambda i, m: affine_warp(i, m, **options), (images, matrix))
    options |= {"color_matrix": colors, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert torch.autograd.gradcheck(lambda i, m: affine_warp(i, m, **options), (images, matrix))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_backward_matches_the_reference(dtype: torch.dtype, interpolation: str, antialias: bool) -> None:
    n, h, w, size = 3, 18, 23, [17, 71]
    images = layout(random_images((n, 3, h, w), dtype), "channels_last" if antialias else "strided")
    matrix = rotation(n, h, w, scale=0.45 if antialias else 1.1)
    colors = torch.rand(n, 3, 4) * 0.6 - 0.1
    grad = torch.rand(n, 3, *size, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    cases = [(mode, colors if i % 2 else None, i >= 2) for i, mode in enumerate(PADDING_MODES)]
    for padding_mode, color, one in cases:
        m = matrix[:1] if one else matrix
        rest = (interpolation, padding_mode, [0.1, 0.2, 0.3], antialias, color, [0.5, 0.6, 0.7], True, True)
        found = backward_op(grad, images, m, *rest)
        expected = reference.affine_warp_backward(grad.double(), images.double(), m, *rest)
        assert found[0].dtype == dtype
        assert found[0].shape == images.shape
        bound = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(dtype, 2e-3)
        torch.testing.assert_close(found[0].double(), expected[0], atol=bound, rtol=bound)
        scale = float(expected[1].abs().max()) + 1
        torch.testing.assert_close(found[1].double() / scale, expected[1] / scale, atol=3 * bound / 10, rtol=0)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_backward_is_deterministic(interpolation: str, padding_mode: str, isa_or_backend: str) -> None:
    """Threads share an image, whose rows they cut anywhere; no cut and no instruction set changes a bit."""
    before, native = torch.get_num_threads(), _native.active_isa()
    for case, (channels, transform, antialias) in enumerate(
        [(3, rotation, False), (1, rotation, True), (6, homography, False), (3, rotation, True)]
    ):
        images = torch.rand(2, channels, 73, 151, generator=torch.Generator().manual_seed(case))
        matrix = transform(1, 73, 151).float()
        if antialias:
            matrix[:, :2, :2] *= 3.1
        grad = torch.rand(2, channels, 90, 141, generator=torch.Generator().manual_seed(case + 9)) - 0.5
        fill = [0.3] * channels
        results = []
        for threads, forced in ((1, None), (2, None), (3, None), (1, "scalar")):
            torch.set_num_threads(threads)
            if forced and BACKEND == "native":
                _native.set_isa(forced)
            results.append(
                backward_op(grad, images, matrix, interpolation, padding_mode, fill, antialias, None, [], True, True)
            )
        torch.set_num_threads(before)
        if native:
            _native.set_isa(native)
        for found in results[1:]:
            assert torch.equal(found[0], results[0][0]), case
            assert torch.equal(found[1], results[0][1]), case


def test_backward_of_bands() -> None:
    """An image whose gradient is made in several bands, with a box that no band's edge respects."""
    images = torch.rand(1, 3, 700, 300)
    for padding_mode, scale in itertools.product(("constant", "edge"), (1.0, 3.3)):
        matrix = rotation(1, 700, 300).float()
        matrix[:, :2, :2] *= scale
        grad = torch.rand(1, 3, 200, 333) - 0.5
        rest = ("bilinear", padding_mode, [0.1] * 3, scale > 1, None, [], True, True)
        found = backward_op(grad, images, matrix, *rest)
        expected = reference.affine_warp_backward(grad.double(), images.double(), matrix, *rest)
        torch.testing.assert_close(found[0].double(), expected[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(found[1], expected[1], atol=1e-3 * float(expected[1].abs().max()), rtol=0)


def test_backward_of_any_matrix_is_safe(isa_or_backend: str) -> None:
    """Huge, degenerate and non-finite matrices read and write nothing beyond the image."""
    extremes = [0.0, 1e-30, 1.0, -3e5, 1e9, 1e300, float("inf"), float("nan")]
    images, grad = torch.rand(1, 3, 9, 11), torch.rand(1, 3, 7, 70)
    draw = np.random.default_rng(3)
    for _ in range(60):
        matrix = torch.from_numpy(draw.choice(extremes, (1, 3, 3)))
        for rows, (interpolation, padding_mode) in itertools.product(
            (2, 3), zip((*INTERPOLATIONS, "bilinear"), PADDING_MODES, strict=True)
        ):
            found = backward_op(
                grad, images, matrix[:, :rows], interpolation, padding_mode, [0.5] * 3, False, None, [], True, True
            )
            assert found[0].isfinite().all()


def test_gradient_of_an_expanded_image() -> None:
    pixel = torch.rand(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    matrix = rotation(2, 8, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, m: affine_warp(p.expand(2, 3, 8, 9), m), (pixel, matrix))


def test_a_gradient_is_not_silently_taken_for_constant() -> None:
    images = torch.rand(1, 1, 4, 4, requires_grad=True)
    (first,) = torch.autograd.grad(affine_warp(images, rotation(1, 4, 4)).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        first.sum().backward()


def test_only_wanted_gradients() -> None:
    images, matrix = torch.rand(1, 2, 4, 5, requires_grad=True), torch.eye(3)[None, :2]
    affine_warp(images, matrix).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.ones_like(images))
    theta = matrix.clone().requires_grad_()
    affine_warp(images.detach(), theta).sum().backward()
    assert theta.grad is not None
    assert theta.grad.shape == matrix.shape


def test_compiled_gradient() -> None:
    images, matrix = torch.rand(2, 3, 6, 7), rotation(2, 6, 7).float()

    def loss(i: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return affine_warp(i, m).square().sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        i, m = images.clone().requires_grad_(), matrix.clone().requires_grad_()
        function(i, m).backward()
        found.append((i.grad, m.grad))
    torch.testing.assert_close(found[0], found[1])
