"""Large outputs take over the memory of earlier ones that are no longer used, and never that of one that is."""

import multiprocessing
import os

import pytest
import torch

import imgopt_fast
from imgopt_fast import _native
from imgopt_fast.ops.photometric import adjust_hue

IDENTITY = torch.eye(3)[None, :2]
MANY = 700  # uint8 images of 64 x 64 x 3: 8.6 MB

pytestmark = pytest.mark.skipif(_native.backend() != "native", reason="the compiled operations allocate so")


def warped(level: int, batch: int = MANY, **options: object) -> torch.Tensor:
    images = torch.full((batch, 3, 64, 64), level, dtype=torch.uint8)
    return imgopt_fast.affine_warp(images, IDENTITY, **options)  # type: ignore[arg-type]


def test_memory_of_a_dropped_output_serves_the_next() -> None:
    first = warped(1)
    address = first.data_ptr()
    del first
    second = warped(2)
    assert second.data_ptr() == address
    assert (second == 2).all()


def test_outputs_in_use_do_not_share_memory() -> None:
    outputs = [warped(level) for level in range(1, 12)]
    for level, output in enumerate(outputs, start=1):
        assert (output == level).all()
    view = outputs.pop()[5:7, :, ::2]  # a view keeps all of its tensor
    del outputs
    later = [warped(level) for level in range(20, 31)]
    assert (view == 11).all()
    assert all((output == level).all() for level, output in enumerate(later, start=20))


def test_blocks_of_another_size() -> None:
    """A smaller output does not take a block of which more than a quarter would lie idle."""
    big = warped(1, 3 * MANY)
    address = big.data_ptr()
    del big
    assert warped(2, MANY).data_ptr() != address
    assert warped(3, 3 * MANY - 100).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_outputs_are_tensors_like_any_other(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    output = warped(51, dtype=dtype, memory_format=memory_format)
    assert output.shape == (MANY, 3, 64, 64)
    assert output.is_contiguous(memory_format=memory_format)
    assert torch.allclose(output.double(), torch.tensor(51.0 if dtype == torch.uint8 else 0.2).double(), atol=1e-3)
    copy = output.clone()
    output.add_(1)
    assert not torch.equal(copy, output)


def test_photometric_outputs_too() -> None:
    images = torch.zeros(MANY, 3, 64, 64, dtype=torch.uint8)
    address = adjust_hue(images, 0.25).data_ptr()
    assert adjust_hue(images, 0.5).data_ptr() == address


def test_masked_products_and_the_gradients_of_their_weights_too() -> None:
    mask = torch.rand(1200, 600) < 0.05
    layout = imgopt_fast.mask_layout(mask)
    weight, x = torch.randn(1200, 600, requires_grad=True), torch.randn(500, 600)
    addresses: set[int] = set()
    for _ in range(3):
        output = imgopt_fast.masked_matmul(x, weight, layout)
        (gradient,) = torch.autograd.grad(output, weight, output.detach())
        torch.testing.assert_close(output, x @ (weight * mask).t())
        torch.testing.assert_close(gradient, (output.t() @ x) * mask, rtol=1e-4, atol=1e-2)
        addresses |= {output.data_ptr(), gradient.data_ptr()}
        del output, gradient
    assert len(addresses) == 2


def _in_child(parent: torch.Tensor) -> None:
    torch.set_num_threads(1)  # as in a worker of a DataLoader: OpenMP's threads do not come along
    child = warped(3)
    os._exit(0 if (child == 3).all() and (parent == 2).all() else 1)


@pytest.mark.filterwarnings("ignore:.*fork")  # Python's, and JAX's where another test has imported it
def test_blocks_survive_a_fork() -> None:
    warped(1)
    kept = warped(2)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(kept,), daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert (kept == 2).all()


def test_an_output_moves_to_shared_memory() -> None:
    """What a worker of a DataLoader does with its batch."""
    output = warped(7)
    output.share_memory_()
    assert output.is_shared()
    assert (output == 7).all()
    assert (warped(8) == 8).all()
    assert (output == 7).all()
