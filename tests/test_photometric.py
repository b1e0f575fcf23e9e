"""Hue, sharpness, sums and histograms: kernels, Numba twin and reference against the same written out."""

import numpy as np
import pytest
import torch

from imgopt_fast import _native
from imgopt_fast.augment import hsv_to_rgb, rgb_to_hsv
from imgopt_fast.ops.photometric import (
    adjust_hue,
    adjust_sharpness,
    apply_table,
    channel_sums,
    fallback,
    level_histogram,
    reference,
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]
SIZES = [(1, 1), (2, 5), (3, 3), (3, 85), (7, 37), (16, 16), (17, 31), (4, 723), (67, 131)]


def random_images(
    size: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format, channels: int = 3
) -> torch.Tensor:
    levels = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8)
    levels[0, :, 0] = levels[0, :1, 0]  # greys, which have no hue
    images = levels if dtype == torch.uint8 else levels.to(dtype) / 255
    return images.contiguous(memory_format=layout)


def assert_same(result: torch.Tensor, exact: torch.Tensor, like: torch.Tensor) -> None:
    """`exact` is float64 and unrounded; uint8 may fall to either side of a tie, no more."""
    assert result.dtype == like.dtype
    assert result.shape == like.shape
    if like.dtype == torch.uint8:
        assert (result - exact).abs().max() <= 0.5 + 1e-3
    else:
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=2e-6)


def exact_hue(images: torch.Tensor, shift: list[float]) -> torch.Tensor:
    """Through the public HSV functions, which tests/test_augment_color.py holds against Python's colorsys."""
    scale = 255 if images.dtype == torch.uint8 else 1
    hsv = rgb_to_hsv(images.double() / scale)
    hsv[:, 0] += torch.tensor(shift, dtype=torch.float64)[:, None, None]
    return hsv_to_rgb(hsv) * scale


def exact_sharpness(images: torch.Tensor, factor: list[float]) -> torch.Tensor:
    most = 255 if images.dtype == torch.uint8 else 1
    exact = images.double()
    if min(images.shape[2:]) < 3:
        return exact
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=torch.float64) / 13
    channels = images.shape[1]
    smooth = torch.nn.functional.conv2d(exact, kernel.expand(channels, 1, 3, 3), groups=channels)
    inner = exact[..., 1:-1, 1:-1]
    f = torch.tensor(factor, dtype=torch.float64).view(-1, 1, 1, 1)
    result = exact.clone()
    result[..., 1:-1, 1:-1] = (f * inner + (1 - f) * smooth).clamp(0, most)
    return result


SHIFTS, FACTORS = [0.3, -0.45, 1.0], [0.0, 1.0, 2.7]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_kernels(isa, size, dtype, layout):
    images = random_images(size, dtype, layout)
    assert_same(adjust_hue(images, SHIFTS), exact_hue(images, SHIFTS), images)
    assert_same(adjust_sharpness(images, FACTORS), exact_sharpness(images, FACTORS), images)
    assert adjust_hue(images, 0.1).stride() == images.stride()
    other = random_images(size, dtype, layout, channels=2)
    assert_same(adjust_sharpness(other, FACTORS), exact_sharpness(other, FACTORS), other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_fallback_and_reference_called_directly(dtype, layout):
    images = random_images((7, 37), dtype, layout)
    for module in (fallback, reference):
        shift, factor = (torch.tensor(v, dtype=torch.float64) for v in (SHIFTS, FACTORS))
        assert_same(module.adjust_hue(images, shift), exact_hue(images, SHIFTS), images)
        assert_same(module.adjust_sharpness(images, factor), exact_sharpness(images, FACTORS), images)


def test_every_colour_keeps_to_the_formula(isa):
    """All pairs of chroma and difference, for turns around the six corners of the circle."""
    a, b = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    planes = torch.stack([a, b, torch.full_like(a, 37)]).to(torch.uint8)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        images = planes[order][None].contiguous(memory_format=torch.channels_last)
        for shift in (1e-4, 1 / 6, 1 / 3, 0.5 - 1e-4, 0.5, 2 / 3, 0.9, 1 - 1e-9):
            assert_same(adjust_hue(images, shift), exact_hue(images, [shift]), images)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 21), (8, 8), (9, 64), (67, 131)])
def test_tables(isa, size, channels, layout):
    images = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8).contiguous(memory_format=layout)
    for count in (1, 3):
        table = torch.randint(0, 256, (count, channels, 256), dtype=torch.uint8)
        found = apply_table(images, table)
        assert found.stride() == images.stride()
        for n in range(3):
            for c in range(channels):
                assert np.array_equal(found[n, c].numpy(), table[n % count, c].numpy()[images[n, c].numpy()])
        for module in (fallback, reference):
            assert torch.equal(module.apply_table(images, table), found)
    cut = images[:, :, : size[0] // 2 + 1, ::2]
    assert torch.equal(apply_table(cut, table), apply_table(images, table)[:, :, : size[0] // 2 + 1, ::2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("size", [(1, 1), (3, 21), (8, 8), (16, 65)])
def test_sums_and_histograms(isa, size, channels, layout):
    images = torch.randint(0, 256, (3, channels, *size), dtype=torch.uint8).contiguous(memory_format=layout)
    sums, histogram = channel_sums(images), level_histogram(images)
    assert sums.dtype == histogram.dtype == torch.int64
    assert histogram.shape == (3, channels, 256)
    for n in range(3):
        for c in range(channels):
            levels = images[n, c].numpy().ravel()
            assert sums[n, c] == levels.sum(dtype=np.int64)
            assert (histogram[n, c].numpy() == np.bincount(levels, minlength=256)).all()
    for module in (fallback, reference):
        assert torch.equal(module.channel_sums(images), sums)
        assert torch.equal(module.level_histogram(images), histogram)
    cut = images[:, :, : size[0] // 2 + 1, ::2]  # not dense in either layout
    assert torch.equal(level_histogram(cut), reference.level_histogram(cut))
    assert torch.equal(channel_sums(cut), reference.channel_sums(cut))


def test_sums_of_white_images_do_not_overflow(isa):
    white = torch.full((1, 3, 300, 400), 255, dtype=torch.uint8)
    for layout in LAYOUTS:
        images = white.contiguous(memory_format=layout)
        assert (channel_sums(images) == 255 * 300 * 400).all()
        assert (level_histogram(images)[..., 255] == 300 * 400).all()


def test_statistics_need_levels():
    with pytest.raises(TypeError, match=r"images: expected uint8, got torch\.float32"):
        channel_sums(torch.zeros(1, 3, 2, 2))
    assert level_histogram(torch.zeros(0, 3, 2, 2, dtype=torch.uint8)).shape == (0, 3, 256)
    assert channel_sums(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)[..., ::2]).tolist() == [[0] * 3] * 2


def test_instruction_sets_agree_bit_for_bit():
    if _native.backend() != "native":
        pytest.skip("no compiled kernels")
    before = _native.active_isa()
    results = {}
    units = torch.rand(2, 3, 33, 65, generator=torch.Generator().manual_seed(1))
    for isa in _native.supported_isas():
        _native.set_isa(isa)
        results[isa] = [
            function(images, amount)
            for images in (units, units.contiguous(memory_format=torch.channels_last), (units * 255.9).byte())
            for function in (adjust_hue, adjust_sharpness)
            for amount in (0.37, 0.7, -3.1, 1e9 + 0.5, -1e30)
        ]
    _native.set_isa(before)
    for isa, result in results.items():
        for ours, scalar in zip(result, results["scalar"], strict=True):
            assert torch.equal(ours, scalar), isa


def test_threads_change_nothing():
    images = torch.randint(0, 256, (5, 3, 190, 170), dtype=torch.uint8)
    table = torch.randint(0, 256, (5, 3, 256), dtype=torch.uint8)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append((adjust_hue(images, 0.2), adjust_sharpness(images, 1.5), apply_table(images, table)))
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_sharpness_of_hundreds_of_channels(isa):
    images = torch.randint(0, 256, (2, 700, 5, 6), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    assert torch.equal(adjust_sharpness(images, 1.7), adjust_sharpness(images.contiguous(), 1.7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    images = random_images((5, 6), dtype, torch.contiguous_format)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 5e-3, torch.float64: 1e-12}[dtype]
    for function, exact, amounts in ((adjust_hue, exact_hue, SHIFTS), (adjust_sharpness, exact_sharpness, FACTORS)):
        result = function(images, amounts)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact(images, amounts), rtol=0, atol=tolerance)


def test_identities_and_layouts():
    images = random_images((9, 11), torch.uint8, torch.contiguous_format)
    for same in (adjust_hue(images, 0.0), adjust_hue(images, -2.0), adjust_sharpness(images, 1.0)):
        assert torch.equal(same, images)
    cut = images[:, :, 1:8, ::2]
    assert torch.equal(adjust_hue(cut, 0.2), adjust_hue(cut.contiguous(), 0.2))
    assert torch.equal(adjust_sharpness(cut, 2.0), adjust_sharpness(cut.contiguous(), 2.0))
    assert adjust_hue(images[:0], 0.1).shape == (0, 3, 9, 11)
    assert adjust_sharpness(images[:, :, :0], 0.5).shape == (3, 3, 0, 11)


def test_gradients():
    images = (0.1 + 0.8 * torch.rand(2, 3, 4, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adjust_hue(x, 0.1), images)
    assert torch.autograd.gradcheck(lambda x: adjust_sharpness(x, [0.5, 1.2]), images)
    single = images.detach().float().requires_grad_()
    adjust_sharpness(single, 0.5).sum().backward()
    assert single.grad is not None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    images = random_images((4, 5), torch.uint8, layout)
    amounts = torch.tensor(SHIFTS, dtype=torch.float64)
    for name in ("adjust_hue", "adjust_sharpness"):
        torch.library.opcheck(getattr(torch.ops.imgopt_fast, name).default, (images, amounts))
    table = torch.randint(0, 256, (3, 3, 256), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.imgopt_fast.apply_table.default, (images, table))


def test_bad_input_names_the_argument():
    images = torch.rand(2, 3, 4, 4)
    for call, error, text in (
        (lambda: adjust_hue(images[0], 0.1), ValueError, "images"),
        (lambda: adjust_hue(images[:, :2], 0.1), ValueError, "images"),
        (lambda: adjust_hue(images, [0.1, 0.2, 0.3]), ValueError, "shift"),
        (lambda: adjust_sharpness(images, np.ones((2, 2))), ValueError, "factor"),
        (lambda: adjust_sharpness(images.int(), 0.1), TypeError, "images"),
        (lambda: adjust_sharpness([1], 0.1), TypeError, "images"),
        (lambda: apply_table(images, torch.zeros(1, 3, 256, dtype=torch.uint8)), TypeError, "images"),
        (lambda: apply_table(images.byte(), torch.zeros(1, 3, 256)), TypeError, "table"),
        (lambda: apply_table(images.byte(), torch.zeros(3, 3, 256, dtype=torch.uint8)), ValueError, "table"),
    ):
        with pytest.raises(error, match=text):
            call()
