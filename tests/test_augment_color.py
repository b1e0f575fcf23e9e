"""The colour functions against Python's colorsys, Pillow and the formulas written out."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import ImageEnhance
from test_augment_policies import as_pillow, from_pillow, photo

from imgopt_fast.augment import (
    ColorJitter,
    Compose,
    Normalize,
    RandomGrayscale,
    RandomHorizontalFlip,
    adjust_hue,
    hsv_to_rgb,
    rgb_to_hsv,
    scale_color,
    statistics,
)


def all_colours() -> torch.Tensor:
    """(3, 9, 81) float64: every combination of nine values per channel, greys and pure colours among them."""
    axis = torch.linspace(0, 1, 9, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).reshape(3, 9, 81)


def test_hsv_matches_colorsys_both_ways():
    rgb = all_colours()
    hsv = rgb_to_hsv(rgb)
    flat = rgb.flatten(1).T.tolist()
    expected = torch.tensor([colorsys.rgb_to_hsv(*c) for c in flat], dtype=torch.float64).T.reshape(rgb.shape)
    torch.testing.assert_close(hsv, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(hsv_to_rgb(hsv), rgb, rtol=0, atol=1e-12)
    turned = hsv.clone()
    turned[0] += 0.3
    back = [colorsys.hsv_to_rgb(h % 1, s, v) for h, s, v in turned.flatten(1).T.tolist()]
    torch.testing.assert_close(
        hsv_to_rgb(turned), torch.tensor(back, dtype=torch.float64).T.reshape(rgb.shape), rtol=0, atol=1e-12
    )


def test_hsv_takes_batches_and_keeps_the_range():
    batch = torch.rand(2, 3, 5, 4)
    assert torch.equal(rgb_to_hsv(batch)[1], rgb_to_hsv(batch[1]))
    nearly_red = torch.tensor([1.0, 0.0, 1e-12]).view(3, 1, 1)  # its hue rounds to a whole turn
    assert rgb_to_hsv(nearly_red)[0] == 0
    with pytest.raises(ValueError, match="images"):
        rgb_to_hsv(torch.rand(4, 5, 5))
    with pytest.raises(ValueError, match="images"):
        hsv_to_rgb(torch.rand(5))


def test_hue_turns_per_sample():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.6, 0.4]]).view(2, 3, 1, 1)
    result = adjust_hue(images, np.array([1 / 3, -0.25]))
    torch.testing.assert_close(result[0].flatten(), torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-6)
    h, s, v = colorsys.rgb_to_hsv(0.2, 0.6, 0.4)
    expected = torch.tensor(colorsys.hsv_to_rgb((h - 0.25) % 1, s, v))
    torch.testing.assert_close(result[1].flatten(), expected, rtol=0, atol=1e-6)
    levels = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(adjust_hue(levels, 0.0), levels)
    assert torch.equal(adjust_hue(levels, 1.0), levels)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_matches_pillow(name, factor):
    image = photo()
    enhancer = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    expected = from_pillow(enhancer[name](as_pillow(image[0])).enhance(factor))
    result = ColorJitter(**{name: (factor, factor)})(image)[0]
    assert (result.int() - expected.int()).abs().max() <= 1  # Pillow rounds greys and truncates


def test_grayscale_matches_pillow():
    expected = torch.from_numpy(np.array(as_pillow(photo()[0]).convert("L")))
    result = RandomGrayscale(1.0)(photo())[0]
    assert (result.int() - expected.int()).abs().max() <= 1
    assert torch.equal(result[0], result[2])


def test_hue_has_its_place_in_the_order():
    images = 0.3 + 0.3 * torch.rand(30, 3, 6, 6, dtype=torch.float64)
    aug = ColorJitter(0.1, 0.2, 0.3, 0.2)
    params = aug.make_params(images, key=(0, 0, range(30)))
    result = aug.transform(images, params)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)[:, None, None]
    for i in range(30):
        x = images[i]
        ((_, drawn),) = params.sample(i)
        steps = {
            "brightness": lambda x, f: x * f,
            "contrast": lambda x, f: f * x + (1 - f) * (x * luma).sum(0).mean(),
            "saturation": lambda x, f: f * x + (1 - f) * (x * luma).sum(0),
        }
        for late in (False, True):
            for (name, step), after in zip(steps.items(), drawn["after_hue"], strict=True):
                x = step(x, drawn[name]) if after == late else x
            x = x if late else adjust_hue(x[None], drawn["hue"])[0]
        torch.testing.assert_close(result[i], x, rtol=0, atol=1e-7)
    orders = params.draws[0]["after_hue"]
    assert 0.2 < orders.mean() < 0.8


def test_scale_color():
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    factor = torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.0, 1.25]])
    expected = (images.double() * factor.double()[:, :, None, None]).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(scale_color(images, factor), expected)
    assert torch.equal(scale_color(images, 1.0), images)
    torch.testing.assert_close(scale_color(images.double() / 255, [0.5, 0.25, 1.0])[:, 1], images[:, 1].double() / 1020)
    with pytest.raises(ValueError, match="factor"):
        scale_color(images, [1.0, 2.0])


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics(channels, layout):
    images = torch.randint(0, 256, (3, channels, 7, 9), dtype=torch.uint8).contiguous(memory_format=layout)
    weights = torch.tensor([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels, dtype=torch.float64)

    def exact(levels: torch.Tensor) -> torch.Tensor:
        return (levels.double() / 255 * weights[:, None, None]).sum(1).mean((1, 2))

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)

    check(statistics.mean_gray(images), exact(images))
    check(statistics.mean_gray(images.double() / 255), exact(images))
    table = torch.randint(0, 256, (3, channels, 256), dtype=torch.uint8)
    check(statistics.mean_gray(images, table), exact(table.gather(2, images.flatten(2).long()).view_as(images)))
    cut = images[:, :, 1:6, ::2]  # not contiguous in either layout
    check(statistics.mean_gray(cut), exact(cut))


def test_contrast_passes_gradients_through_the_mean():
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 0.2 + 0.4  # nothing is clipped
    aug = Compose([RandomHorizontalFlip(), ColorJitter(contrast=(0.5, 1.5)), Normalize([0.5] * 3, [0.3] * 3)])
    params = aug.make_params(images, key=(0, 0, range(2)))
    assert torch.autograd.gradcheck(lambda x: aug.transform(x, params), images.requires_grad_())
