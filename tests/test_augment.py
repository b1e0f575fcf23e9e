"""The pipeline: folding into one call, replay, layouts, annotations."""

import pickle

import numpy as np
import pytest
import torch
from pipelines import MEAN, STD, photos, training_recipe

from imgopt_fast import augment
from imgopt_fast.augment import (
    CenterCrop,
    ColorJitter,
    Compose,
    Normalize,
    RandomAffine,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
    fold,
    geometry,
    samples,
)
from imgopt_fast.ops.affine_warp import affine_warp


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every call of affine_warp that the pipelines make."""
    seen: list[dict] = []

    def recorded(images, matrix, **options):
        seen.append({"images": images, "matrix": matrix, **options})
        return affine_warp(images, matrix, **options)

    monkeypatch.setattr(fold, "affine_warp", recorded)
    return seen


# ---------------------------------------------------------------------------------------------------- folding


def test_a_training_recipe_is_one_call(calls):
    images = photos()
    result = training_recipe()(images, key=(0, 0, range(6)))
    assert len(calls) == 1
    assert result.dtype == torch.float32
    assert calls[0]["matrix"].shape == (6, 2, 3)
    assert calls[0]["interpolation"] == "bilinear"


def test_folding_equals_one_sampling_of_the_composed_map(calls):
    images = torch.rand(4, 3, 20, 24, dtype=torch.float64)
    aug = Compose(
        [
            RandomResizedCrop((16, 18), antialias=False),
            RandomHorizontalFlip(),
            RandomAffine(20, (0.1, 0.1), (0.8, 1.1), 5, fill=0.3),
            RandomVerticalFlip(),
        ]
    )
    params = aug.make_params(images, key=(0, 0, range(4)))
    matrix = np.eye(3)[None]
    size = (20, 24)
    for leaf, draw in zip(aug.leaves(), params.draws, strict=True):
        matrix = matrix @ geometry.homogeneous(leaf.matrix(draw, size))
        size = leaf.output_size(size)
    expected = affine_warp(images, torch.from_numpy(matrix[:, :2].copy()), size=(16, 18), fill=0.3)
    torch.testing.assert_close(aug.transform(images, params), expected, rtol=0, atol=1e-12)
    assert len(calls) == 1
    assert calls[0]["interpolation"] == "bilinear"  # the finer of the two


def test_colour_matches_torchs_formulas_applied_one_by_one():
    images = 0.3 + 0.3 * torch.rand(5, 3, 8, 9, dtype=torch.float64)  # no clipping
    aug = Compose([ColorJitter(0.2, 0.2, 0.2), RandomGrayscale(0.5), ColorJitter(0.2, 0.2, 0.2)])
    params = aug.make_params(images, key=(0, 0, range(5)))
    expected = images.clone()

    def grey(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype)[:, None, None]).sum(0)

    for i in range(5):
        x = expected[i]
        for _, values in params.sample(i):
            if "gray" in values:
                x = grey(x).expand_as(x) if values["gray"] else x
                continue
            b, c, s = (values[k] for k in ("brightness", "contrast", "saturation"))
            x = b * x
            x = c * x + (1 - c) * grey(x).mean()
            x = s * x + (1 - s) * grey(x)
        expected[i] = x
    torch.testing.assert_close(aug.transform(images, params), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_jitter_of_other_channel_counts(channels):
    images = photos(3, channels)
    aug = Compose([RandomHorizontalFlip(), ColorJitter(0.4, 0.4, 0.4), Normalize([0.5] * channels, [0.25] * channels)])
    params = aug.make_params(images, key=(0, 0, range(3)))
    result = aug.transform(images, params)
    for i in range(3):
        (_, flip), (_, jitter) = params.sample(i)
        x = images[i].double() / 255
        x = x.flip(2) if flip["flip"] else x
        b, c, s = (jitter[k] for k in ("brightness", "contrast", "saturation"))
        x = b * (c * (s * x + (1 - s) * x.mean(0)) + (1 - c) * x.mean())
        torch.testing.assert_close(result[i].double(), (x.clamp(0, 1) - 0.5) / 0.25, rtol=0, atol=2e-6)
    assert ColorJitter(0.4)(images).dtype == torch.uint8


def test_linear_colour_commutes_with_geometry_that_invents_nothing(calls):
    images = photos()
    Compose([ColorJitter(0.2, 0.2), RandomHorizontalFlip(), RandomResizedCrop(8), Normalize(MEAN, STD)])(images)
    assert len(calls) == 1
    calls.clear()
    Compose([ColorJitter(0.2), RandomAffine(10, fill=128), Normalize(MEAN, STD)])(images)
    assert len(calls) == 2  # the fill must not be jittered


def test_borders_that_disagree_are_not_merged(calls):
    Compose([RandomCrop(20, padding=2, padding_mode="reflect"), RandomAffine(10)])(photos())
    assert [call["padding_mode"] for call in calls] == ["reflect", "constant"]
    calls.clear()
    Compose([RandomAffine(10, fill=1), RandomAffine(10, fill=2)])(photos())
    assert len(calls) == 2


def test_exact_maps_stay_exact(calls):
    images = photos()
    aug = Compose([RandomCrop((20, 24), padding=4), RandomHorizontalFlip(), RandomVerticalFlip(), CenterCrop((10, 11))])
    params = aug.make_params(images, key=(0, 0, range(6)))
    result = aug.transform(images, params)
    assert len(calls) == 1
    assert calls[0]["interpolation"] == "nearest"
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i in range(6):
        (_, crop), (_, horizontal), (_, vertical) = params.sample(i)
        top, left = int(crop["top"]) + 4, int(crop["left"]) + 4
        x = padded[i, :, top : top + 20, left : left + 24]
        x = x.flip(2) if horizontal["flip"] else x
        x = x.flip(1) if vertical["flip"] else x
        assert torch.equal(result[i], x[:, 5:15, 6:17])


def test_normalize_alone_and_dtypes():
    images = photos()
    scale = torch.tensor(STD, dtype=torch.float64)[:, None, None]
    expected = (images.double() / 255 - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / scale
    result = Normalize(MEAN, STD)(images)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    assert Normalize(MEAN, STD, dtype=torch.bfloat16)(images).dtype == torch.bfloat16
    assert Normalize(MEAN, STD)(images.half() / 255).dtype == torch.float16
    assert Normalize(MEAN, STD)(images.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_nothing_to_do_returns_the_images():
    images = photos()
    assert Compose([])(images) is images
    assert ColorJitter()(images) is images
    assert ColorJitter(None, None, None, None)(images) is images
    assert RandomAffine(0)(images[:0]).shape == (0, 3, 20, 24)


# ---------------------------------------------------------------------------------------------------- replay and form


def test_parameters_replay_and_print():
    images, aug = photos(), training_recipe()
    params = aug.make_params(images, key=(0, 1, range(6)))
    assert torch.equal(aug.transform(images, params), aug(images, key=(0, 1, range(6))))
    line = params.describe(2)
    assert line.startswith("RandomCrop(top=")
    assert "RandomAffine(angle=" in line
    assert "Normalize" not in line
    assert str(params).count("\n") == 5
    still = RandomAffine(0, translate=(0.001, 0.001)).make_params(images, key=(0, 1, range(6)))
    assert [still.describe(i) for i in range(6)] == ["RandomAffine(angle=0, translate=(0, 0))"] * 6, "never -0"
    assert len(params) == 6
    with pytest.raises(IndexError):
        params.sample(6)
    with pytest.raises(ValueError, match="params"):
        aug.transform(images[:2], params)
    restored = pickle.loads(pickle.dumps((aug, params)))
    assert torch.equal(restored[0].transform(images, restored[1]), aug.transform(images, params))


def test_numpy_images_are_channels_last():
    images, aug = photos(), Compose([RandomHorizontalFlip(), RandomAffine(20, interpolation="bilinear")])
    expected = aug(images, key=(0, 0, range(6)))
    batch = images.permute(0, 2, 3, 1).contiguous().numpy()
    result = aug(batch, key=(0, 0, range(6)))
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, expected.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(aug(batch[1], key=(0, 0, 1)), result[1])
    np.testing.assert_array_equal(aug(batch[1, :, :, 0], key=(0, 0, 1)), result[1, :, :, 0])
    flipped = batch[:, ::-1]  # a negative stride, and read-only
    flipped.flags.writeable = False
    np.testing.assert_array_equal(aug(flipped, key=(0, 0, range(6))), aug(flipped.copy(), key=(0, 0, range(6))))


def test_layout_is_preserved():
    images = photos().to(memory_format=torch.channels_last)
    result = training_recipe()(images, key=(0, 0, range(6)))
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, training_recipe()(images.contiguous(), key=(0, 0, range(6))), rtol=0, atol=1e-5)


def test_sizes():
    images = photos(2, 3, 30, 40)
    for transform, shape in (
        (Resize(15), (15, 20)),
        (Resize(15, max_size=18), (13, 18)),
        (Resize((7, 9)), (7, 9)),
        (Resize(None, max_size=20), (15, 20)),
        (Resize([15]), (15, 20)),
        (CenterCrop(50), (50, 50)),
        (RandomResizedCrop((5, 6)), (5, 6)),
        (RandomRotation(90, expand=True), (50, 50)),
        (RandomRotation((0, 0), expand=True), (30, 40)),
        (RandomRotation((90, 90), expand=True), (40, 30)),
        (RandomCrop(45, pad_if_needed=True), (45, 45)),
    ):
        assert transform(images).shape[2:] == shape, transform
        assert transform.output_size((30, 40)) == shape
    turned = RandomRotation((90, 90), expand=True)(images)
    assert torch.equal(turned, images.rot90(1, (2, 3)))  # counter-clockwise
    padded = CenterCrop((34, 40))(images)
    assert torch.equal(padded[:, :, 2:32], images)
    assert (padded[:, :, :2] == 0).all()


def test_no_side_is_resized_to_nothing():
    for transform in (Resize(None, max_size=20), Resize(1, max_size=20)):
        assert transform(photos(1, 3, 1, 100)).shape[2:] == (1, 20)


def test_resize_matches_interpolate():
    images = torch.rand(2, 3, 13, 17, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(images, (20, 31), mode="bilinear", align_corners=False)
    torch.testing.assert_close(Resize((20, 31))(images), expected, rtol=0, atol=1e-12)
    expected = torch.nn.functional.interpolate(images, (20, 31), mode="bicubic", align_corners=False)
    torch.testing.assert_close(Resize((20, 31), "bicubic")(images), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shrink", [Resize((8, 10)), RandomResizedCrop((8, 10), (1.0, 1.0), (1.25, 1.25))])
def test_shrinking_averages_unless_told_otherwise(shrink):
    images = torch.rand(3, 2, 32, 40, dtype=torch.float64)
    expected = torch.nn.functional.avg_pool2d(images, 4)
    torch.testing.assert_close(shrink(images), expected, rtol=0, atol=1e-12)
    assert (Resize((8, 10), antialias=False)(images) - expected).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------------- annotations


def test_annotations_follow_the_images():
    images = torch.zeros(5, 1, 40, 48)
    points = torch.tensor([[[20.0, 16.0], [25.0, 22.0]]]).expand(5, -1, -1)
    for i in range(2):
        images[:, 0, 16 + 6 * i, 20 + 5 * i] = 1
    aug = Compose(
        [RandomHorizontalFlip(), RandomAffine(20, scale=(1.8, 2.2), interpolation="bilinear"), Resize((60, 50))]
    )
    params = aug.make_params(images, key=(4, 0, range(5)))
    result = aug.transform(images, params)
    moved = aug.transform_keypoints(points, params)
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(50.0), indexing="ij")
    for i in range(5):
        for px, py in moved[i]:  # the blob around each moved point has it as its centre of mass
            near = result[i, 0] * (((x - px).abs() < 5) & ((y - py).abs() < 5))
            assert abs((near * x).sum() / near.sum() - px) < 0.5
            assert abs((near * y).sum() / near.sum() - py) < 0.5
    boxes = torch.cat([points, points + 1], dim=-1)  # the pixels around the points, along their edges
    around = aug.transform_boxes(boxes, params)
    torch.testing.assert_close((around[..., :2] + around[..., 2:]) / 2 - 0.5, moved)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.int16, torch.float32])
def test_masks_are_sampled_nearest(dtype):
    masks = torch.randint(0, 2 if dtype == torch.bool else 100, (4, 20, 24)).to(dtype)
    aug = Compose([RandomHorizontalFlip(), RandomCrop((16, 16), padding=2), RandomGrayscale()])
    params = aug.make_params(photos(4), key=(0, 0, range(4)))
    moved = aug.transform_masks(masks, params)
    assert moved.dtype == dtype
    assert torch.equal(moved.double(), aug.transform(masks[:, None].double(), params)[:, 0])
    assert torch.equal(aug.transform_masks(masks[:, None], params)[:, 0], moved)
    with pytest.raises(ValueError, match="masks"):
        aug.transform_masks(masks[:2], params)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (7, 3, 5, 5), (7, 1, 4, 6), (7, 2, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool])
def test_samples_are_taken_out_and_put_back(shape, dtype, layout):
    images = torch.randint(0, 256, shape).to(dtype).contiguous(memory_format=layout)
    index = torch.tensor([5, 0, 3])
    some = samples.taken(images, index)
    assert torch.equal(some, images[index])
    assert some.is_contiguous(memory_format=layout)
    other = torch.randint(0, 256, some.shape).to(dtype)
    expected = images.index_copy(0, index, other)
    assert samples.put(images, index, other) is images
    assert torch.equal(images, expected)
    part = torch.zeros(9, *shape[1:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]  # not dense
    assert torch.equal(samples.put(part, index, other)[index], other)


def test_a_table_alone_needs_no_warp(calls):
    images = photos(3)
    expected = (images.double() * 0.5).round().to(torch.uint8)
    assert torch.equal(augment.scale_color(images, 0.5), expected)
    assert calls == []
