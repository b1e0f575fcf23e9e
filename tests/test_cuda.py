"""Every operation on CUDA: its kernels are registered, and what has no file of its own. cuda_device.py says where."""

from typing import Any

import pytest
import test_int8_graph as graph_tests
import test_masked_sgd as sgd_tests
import test_photometric as photometric_tests
import torch
import warp_problems
from cuda_device import EMULATED, KEY, moved

import imgopt_fast
from imgopt_fast.ops import photometric, registration
from imgopt_fast.ops.int8_graph import int8_graph
from imgopt_fast.ops.masked_sgd import KeptBits, masked_sgd

OPERATIONS = (
    "affine_warp", "affine_warp_backward", "adjust_hue", "adjust_sharpness", "int8_conv2d", "int8_graph",
    "masked_matmul", "masked_matmul_packed", "masked_matmul_weight_grad", "int8_masked_matmul", "block_matmul",
    "masked_sgd", "packed_block_matmul",
)  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_kernels_are_registered(name: str) -> None:
    assert registration.has_kernel(name, KEY)


@pytest.mark.parametrize("layout", photometric_tests.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_hue_and_sharpness(device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for size in photometric_tests.SIZES:
        images = photometric_tests.random_images(size, dtype, layout)
        shifts, factors = photometric_tests.SHIFTS, photometric_tests.FACTORS
        found = photometric.adjust_hue(images.to(device), shifts).cpu()
        photometric_tests.assert_same(found, photometric_tests.exact_hue(images, shifts), images)
        found = photometric.adjust_sharpness(images.to(device), factors).cpu()
        photometric_tests.assert_same(found, photometric_tests.exact_sharpness(images, factors), images)


def test_calls_are_captured_into_a_cuda_graph(device: torch.device) -> None:
    if EMULATED:
        pytest.skip("the emulator has no CUDA graphs")
    images = warp_problems.random_images((2, 3, 32, 32)).to(device)
    matrix = warp_problems.rotation(2, 32, 32).to(device)
    program = graph_tests.network("float")
    there = program._replace(constants=program.constants.to(device), packed=program.packed.to(device))
    inputs = [x.to(device) for x in graph_tests.operands(2, 17, 19)]

    def run() -> list[torch.Tensor]:
        warped = imgopt_fast.affine_warp(images, matrix, dtype=torch.bfloat16, antialias=True)
        return [warped, *int8_graph(inputs, there)]

    with torch.inference_mode():
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        images.copy_(images.flip(3))
        inputs[0].mul_(-1)
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(results, run(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("options", sgd_tests.OPTIONS)
def test_masked_sgd(device: torch.device, options: dict[str, Any]) -> None:
    def run(weight: torch.Tensor, velocity: Any, grad: torch.Tensor, kept: KeptBits, **how: Any) -> None:
        there = KeptBits(kept.bits.to(device), kept.offsets.to(device), kept.entries, kept.kept)
        w, v, g = (moved(t, device) for t in (weight, velocity, grad))
        masked_sgd(w, v, g, there, **how)
        weight.copy_(w)
        if velocity is not None:
            velocity.copy_(v)

    for size in (0, 1, 63, 65, 4096, 3 * 4096 + 77):
        for density in sgd_tests.DENSITIES:
            sgd_tests.check(run, options, size, density)
