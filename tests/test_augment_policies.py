"""Tables, sharpness and the policies made of them, against Pillow's ImageOps, ImageEnhance and geometry."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from imgopt_fast import affine_warp
from imgopt_fast.augment import (
    Compose,
    Normalize,
    Params,
    RandAugment,
    RandomHorizontalFlip,
    RandomResizedCrop,
    TrivialAugmentWide,
    adjust_sharpness,
    fold,
    tables,
)
from imgopt_fast.augment.policies import OPERATIONS

IDENTITY = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])


def photo(seed: int = 0, height: int = 24, width: int = 28) -> torch.Tensor:
    """Smooth, with a limited range of levels, so that autocontrast and equalize have something to do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (fine * 170 + 30).clamp(0, 255).to(torch.uint8)


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def looked_up(image: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return affine_warp(image, IDENTITY, interpolation="nearest", table=table)[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_posterize(bits):
    table = torch.from_numpy(tables.posterize([bits]))[:, None].expand(1, 3, 256)
    assert torch.equal(looked_up(photo(), table), from_pillow(ImageOps.posterize(as_pillow(photo()[0]), bits)))


@pytest.mark.parametrize("threshold", [0, 100, 127.5, 255])
def test_solarize(threshold):
    table = torch.from_numpy(tables.solarize([threshold]))[:, None].expand(1, 3, 256)
    assert torch.equal(looked_up(photo(), table), from_pillow(ImageOps.solarize(as_pillow(photo()[0]), threshold)))


def test_invert():
    table = torch.from_numpy(tables.invert()).expand(1, 3, 256)
    assert torch.equal(looked_up(photo(), table), from_pillow(ImageOps.invert(as_pillow(photo()[0]))))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocontrast_and_equalize(layout):
    image = photo().contiguous(memory_format=layout)
    stretched = from_pillow(ImageOps.autocontrast(as_pillow(image[0])))
    difference = looked_up(image, tables.autocontrast(image)).int() - stretched.int()
    assert difference.abs().max() <= 1  # Pillow truncates a float product, we an exact quotient
    assert torch.equal(looked_up(image, tables.equalize(image)), from_pillow(ImageOps.equalize(as_pillow(image[0]))))


def test_flat_images_stay_as_they_are():
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    flat[0, 1, 0, 0] = 78
    for make in (tables.autocontrast, tables.equalize):
        table = make(flat)
        assert torch.equal(looked_up(flat, table)[0], flat[0, 0])
    empty = torch.zeros(0, 3, 4, 4, dtype=torch.uint8)
    assert tables.equalize(empty).shape == (0, 3, 256)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.9])
def test_sharpness(factor):
    image = torch.cat([photo(0), photo(1)])
    result = adjust_sharpness(image, np.array([factor, 1.0]))
    expected = from_pillow(ImageEnhance.Sharpness(as_pillow(image[0])).enhance(factor))
    assert (result[0].int() - expected.int()).abs().max() <= 1  # Pillow rounds the smoothed image first
    assert torch.equal(result[1], image[1])
    exact = adjust_sharpness(image.double() / 255, factor)[0] * 255
    assert (result[0] - exact).abs().max() <= 0.5 + 1e-4
    levels = torch.tensor([-0.5, 1.5]).view(2, 1, 1, 1).expand(2, 3, 3, 3)
    assert adjust_sharpness(levels, 1.0)[:, :, 1, 1].unique().tolist() == [0.0, 1.0]  # floats are clipped even so
    thin = photo()[:, :, :2]
    assert torch.equal(adjust_sharpness(thin, factor), thin)


def by_pillow(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """One operation as torchvision defines it, with Pillow's nearest sampling."""
    if name == "Identity":
        return image
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(1 + magnitude)
    if name == "Posterize":
        return ImageOps.posterize(image, int(magnitude))
    if name == "Solarize":
        return ImageOps.solarize(image, magnitude)
    if name in ("AutoContrast", "Equalize"):
        return getattr(ImageOps, name.lower())(image)
    if name == "Rotate":
        return image.rotate(magnitude)
    data = {
        "ShearX": (1, magnitude, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, magnitude, 1, 0),
        "TranslateX": (1, 0, -magnitude, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, -magnitude),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, data)


def one_operation(name: str, magnitude: float) -> Params:
    draw = {"operation": np.array([[OPERATIONS.index(name)]]), "magnitude": np.array([[magnitude]])}
    return Params(("TrivialAugmentWide",), (draw,), 1, (24, 28))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_operation_of_a_policy(name, sign):
    magnitude = {"Posterize": 3.0, "Solarize": 100.0, "Rotate": 25.0, "TranslateX": 5.0, "TranslateY": 4.0}.get(
        name, 0.3
    )
    if name not in ("Posterize", "Solarize"):
        magnitude *= sign
    result = TrivialAugmentWide().transform(photo(), one_operation(name, magnitude))[0]
    expected = from_pillow(by_pillow(as_pillow(photo()[0]), name, magnitude))
    difference = (result.int() - expected.int()).abs()
    if name in ("Rotate", "ShearX", "ShearY"):  # nearest ties fall differently
        assert (difference > 2).float().mean() < 0.02
    else:
        assert difference.max() <= 1


def test_magnitudes_are_torchvisions():
    index = range(5000)
    images = torch.empty(1, 1, 1, 1, dtype=torch.uint8).expand(5000, 3, 100, 331)
    (draw,) = TrivialAugmentWide().make_params(images, key=(1, 0, index)).draws
    operation, magnitude = draw["operation"][:, 0], draw["magnitude"][:, 0]
    assert np.bincount(operation, minlength=14).min() > 280  # 357 expected, 5 standard deviations are 91
    for name, low, high, kinds in (
        ("ShearX", -0.99, 0.99, 61), ("TranslateY", -32, 32, 61), ("Rotate", -135, 135, 61),
        ("Contrast", -0.99, 0.99, 61), ("Posterize", 2, 8, 7), ("Solarize", 0, 255, 31), ("Equalize", 0, 0, 1),
    ):  # fmt: skip
        found = magnitude[operation == OPERATIONS.index(name)]
        assert (found.min(), found.max()) == pytest.approx((low, high)), name
        assert len(np.unique(found)) <= kinds
    (draw,) = RandAugment(3, 9).make_params(images, key=(1, 0, index)).draws
    assert draw["operation"].shape == (5000, 3)
    for name, expected in (
        ("ShearX", {-0.09, 0.09}), ("TranslateX", {-45.0, 45.0}), ("TranslateY", {-13.0, 13.0}),
        ("Rotate", {-9.0, 9.0}), ("Color", {-0.27, 0.27}), ("Posterize", {7.0}), ("Solarize", {178.5}),
    ):  # fmt: skip
        found = np.unique(np.round(draw["magnitude"][draw["operation"] == OPERATIONS.index(name)], 9))
        assert set(found.tolist()) == expected, name


def test_a_batch_under_a_policy_equals_its_samples():
    images = torch.cat([photo(i) for i in range(12)])
    for policy in (TrivialAugmentWide(interpolation="bilinear"), RandAugment(3, 15, fill=(1, 2, 3))):
        aug = Compose([RandomHorizontalFlip(), policy, RandomHorizontalFlip()])
        result = aug(images, key=(5, 1, range(12)))
        for i in range(12):
            assert torch.equal(aug(images[i], key=(5, 1, i)), result[i])


def test_two_steps_equal_two_policies_of_one():
    """Rounding to uint8 between the steps of the peer costs a level; ties of nearest none, as both sample the same."""
    images = torch.cat([photo(i) for i in range(40)])
    aug = RandAugment(2, 9)
    params = aug.make_params(images, key=(2, 0, range(40)))
    result = aug.transform(images, params)
    step = images
    for k in range(2):
        draw = {name: values[:, k : k + 1] for name, values in params.draws[0].items()}
        step = TrivialAugmentWide().transform(step, Params(("",), (draw,), 40, (24, 28)))
    first, second = params.draws[0]["operation"].T
    linear = [OPERATIONS.index(name) for name in ("Brightness", "Color", "Contrast")]
    geometric = range(1, 6)
    for i in range(40):
        if first[i] in geometric and second[i] in geometric:
            continue  # one sampling instead of two
        clipped = first[i] in linear and second[i] in linear
        difference = (result[i].int() - step[i].int()).abs()
        assert (difference > 2).float().mean() <= (0.35 if clipped else 0.02), params.describe(i)


@pytest.fixture
def warps(monkeypatch):
    """The number of samples of each warp that a fold makes."""
    seen: list[int] = []

    def counted(images, *args, **options):
        seen.append(len(images))
        return affine_warp(images, *args, **options)

    monkeypatch.setattr(fold, "affine_warp", counted)
    return seen


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("around", ["nothing", "a flip and normalisation"])
def test_a_policy_warps_a_batch_once_per_step_at_most(warps, steps, around):
    """The last warp has the whole batch; those before it only the samples whose operations break the order."""
    images = torch.cat([photo(i) for i in range(48)])
    policy = RandAugment(steps)
    aug = policy if around == "nothing" else Compose([RandomHorizontalFlip(), policy, Normalize([0.5] * 3, [0.2] * 3)])
    counts = []
    for epoch in range(12):
        warps.clear()
        aug(images, key=(0, epoch, range(48)))
        assert warps[-1] == 48
        assert all(count < 48 for count in warps[:-1])
        counts.append(len(warps))
    assert max(counts) == steps


def test_a_policy_after_a_crop_takes_two_warps(warps):
    images = torch.cat([photo(i) for i in range(16)])
    aug = Compose([RandomResizedCrop(16), TrivialAugmentWide(), Normalize([0.5] * 3, [0.2] * 3)])
    aug(images, key=(0, 0, range(16)))
    assert warps == [16, 16]


def test_operations_are_named_when_printed():
    params = RandAugment(2).make_params(photo(), key=(0, 0, [0]))
    ((_, values),) = params.sample(0)
    assert set(values["operation"]) <= set(OPERATIONS)
    assert values["operation"][0] in params.describe(0)


def test_bad_input():
    with pytest.raises(TypeError, match="uint8"):
        TrivialAugmentWide().transform(photo().float(), one_operation("Equalize", 0.0))
    for make, text in (
        (lambda: RandAugment(0), "num_ops"),
        (lambda: RandAugment(1, 31), "magnitude"),
        (lambda: TrivialAugmentWide(1), "num_magnitude_bins"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
