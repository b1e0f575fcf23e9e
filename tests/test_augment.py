"""The pipeline: draws keyed per sample, folding into one call, replay, layouts, annotations, and bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch

from imgopt_fast import augment
from imgopt_fast.augment import (
    CenterCrop,
    ColorJitter,
    Compose,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    Resize,
    TrivialAugmentWide,
    fold,
    geometry,
    samples,
)
from imgopt_fast.ops.affine_warp import affine_warp

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def photos(n: int = 6, channels: int = 3, height: int = 20, width: int = 24) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8)


def training_recipe() -> Compose:
    return Compose(
        [
            RandomCrop((20, 24), padding=3),
            RandomHorizontalFlip(),
            RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 5, interpolation="bilinear"),
            ColorJitter(0.4, 0.4, 0.4),
            RandomGrayscale(0.3),
            Normalize(MEAN, STD),
        ]
    )


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The keyword arguments of every call of affine_warp that the pipelines make."""
    seen: list[dict] = []

    def recorded(images, matrix, **options):
        seen.append({"images": images, "matrix": matrix, **options})
        return affine_warp(images, matrix, **options)

    monkeypatch.setattr(fold, "affine_warp", recorded)
    return seen


# ---------------------------------------------------------------------------------------------------- draws


def test_a_sample_gets_the_same_draw_in_every_batch():
    images, aug, index = photos(), training_recipe(), torch.tensor([3, 1_000_000_007, 5, 2**40, 0, 9])
    whole = aug(images, key=(7, 2, index))
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    assert torch.equal(aug(images[order], key=(7, 2, index[order])), whole[order])
    for i in range(len(images)):
        assert torch.equal(aug(images[i], key=(7, 2, int(index[i]))), whole[i])
    assert torch.equal(
        torch.cat([aug(images[:2], key=(7, 2, index[:2])), aug(images[2:], key=(7, 2, index[2:]))]), whole
    )


def test_seed_epoch_and_index_all_matter():
    images = photos(1).expand(4, -1, -1, -1)
    index = np.arange(4)
    base = training_recipe()(images, key=(1, 1, index))
    assert not torch.equal(base[0], base[1])
    for key in ((2, 1, index), (1, 2, index), (1 + (1 << 32), 1, index), (1, 1, index + 4)):
        assert not torch.equal(training_recipe()(images, key=key), base)


def test_torch_seeds_the_calls_without_a_key():
    images, aug = photos(), training_recipe()
    torch.manual_seed(5)
    first, second = aug(images), aug(images)
    torch.manual_seed(5)
    assert torch.equal(aug(images), first)
    assert not torch.equal(first, second)
    generator = torch.Generator().manual_seed(3)
    drawn = aug(images, generator=generator)
    assert torch.equal(aug(images, generator=generator.manual_seed(3)), drawn)


def test_draws_stay_what_they_were():
    """A key means the same augmentation in every version; these were drawn by the first one."""
    aug = Compose(
        [
            RandomResizedCrop(24),
            RandomCrop(20, padding=4),
            RandomHorizontalFlip(),
            RandomRotation(30),
            RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 5),
            RandomPerspective(),
            ColorJitter(0.4, 0.4, 0.4, 0.1),
            RandomGrayscale(0.3),
            RandAugment(),
            TrivialAugmentWide(),
            RandomErasing(1.0),
        ]
    )
    params = aug.make_params(torch.zeros(2, 3, 32, 40, dtype=torch.uint8), key=(2**63 + 11, 3, [5, 2**40 + 7]))
    assert params.describe(1).split("  ") == [
        "RandomResizedCrop(top=0, left=12, height=27, width=28)",
        "RandomCrop(top=4, left=-4)",
        "RandomHorizontalFlip(flip=True)",
        "RandomRotation(angle=-3.74)",
        "RandomAffine(angle=11.4, translate=(1, 1), scale=1.04, shear=(4.83, 0))",
        "RandomPerspective(corners=((4, 4), (16, 0), (15, 15), (5, 16)))",
        "ColorJitter(brightness=0.649, contrast=0.881, saturation=0.91, hue=-0.067, after_hue=(True, True, True))",
        "RandomGrayscale(gray=False)",
        "RandAugment(operation=(TranslateX, Identity), magnitude=(2, 0))",
        "TrivialAugmentWide(operation=(AutoContrast), magnitude=(0))",
        "RandomErasing(top=3, left=4, height=16, width=6)",
    ]


def test_transforms_of_one_kind_draw_independently():
    params = Compose([RandomHorizontalFlip(), RandomHorizontalFlip()]).make_params(
        torch.empty(2000, 3, 2, 2), key=(0, 0, range(2000))
    )
    first, second = (draw["flip"] for draw in params.draws)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


class _Samples(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images, self.aug = images, training_recipe()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.aug(self.images[i], key=(1, 2, i))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_workers_do_not_change_the_draws():
    images = photos(8)
    expected = training_recipe()(images, key=(1, 2, range(8)))
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(_Samples(images), batch_size=3, num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), expected)


def draws(transform: augment.Transform, height: int = 100, width: int = 160, n: int = 20000) -> dict[str, np.ndarray]:
    (draw,) = transform.make_params(torch.empty(n, 3, 1, 1).expand(n, 3, height, width), key=(3, 0, range(n))).draws
    return draw


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low
    assert values.max() <= high
    counts = np.histogram(values, 20, (low, high))[0]
    expected = len(values) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 19 degrees of freedom: P < 5e-6


def test_statistics_of_the_draws():
    assert abs(draws(RandomHorizontalFlip(0.3))["flip"].mean() - 0.3) < 0.02
    affine = draws(RandomAffine((-10, 30), (0.1, 0.2), (0.5, 1.5), (-4, 6, 1, 2)))
    assert_uniform(affine["angle"], -10, 30)
    assert_uniform(affine["scale"], 0.5, 1.5)
    assert_uniform(affine["shear"][:, 0], -4, 6)
    assert_uniform(affine["shear"][:, 1], 1, 2)
    assert abs(affine["translate"]).max(axis=0).tolist() == [16, 20]
    assert np.array_equal(affine["translate"], np.rint(affine["translate"]))
    crop = draws(RandomCrop((90, 150), padding=(1, 2, 3, 4)))
    assert np.unique(crop["left"]).tolist() == list(range(-1, 14))
    assert np.unique(crop["top"]).tolist() == list(range(-2, 15))
    assert np.bincount((crop["top"] + 2).astype(int)).std() < 4 * np.sqrt(20000 / 17)
    assert_uniform(draws(ColorJitter(brightness=0.4))["brightness"], 0.6, 1.4)
    assert_uniform(draws(ColorJitter(hue=(-0.1, 0.3)))["hue"], -0.1, 0.3)
    assert abs(draws(RandomGrayscale(0.2))["gray"].mean() - 0.2) < 0.02
    assert_uniform(draws(RandomRotation((5, 25)))["angle"], 5, 25)


def test_resized_crops_have_the_asked_area_and_ratio():
    draw = draws(RandomResizedCrop(32, scale=(0.1, 0.4), ratio=(0.5, 2.0)))
    area, ratio = draw["height"] * draw["width"] / 16000, draw["width"] / draw["height"]
    assert 0.09 < area.min() < 0.11
    assert 0.39 < area.max() < 0.41
    assert abs(np.median(np.log(ratio))) < 0.05
    assert (draw["top"] >= 0).all()
    assert (draw["left"] >= 0).all()
    assert (draw["top"] + draw["height"] <= 100).all()
    assert (draw["left"] + draw["width"] <= 160).all()
    impossible = draws(RandomResizedCrop(32, scale=(1.0, 1.0), ratio=(4.0, 4.0)), n=5)  # falls back to the middle
    assert impossible["width"].tolist() == [160] * 5
    assert impossible["height"].tolist() == [40] * 5
    assert impossible["top"].tolist() == [30] * 5


def test_perspective_moves_corners_inwards():
    corners = draws(RandomPerspective(0.4, 0.7))["corners"]
    still = (corners == np.array([[0, 0], [159, 0], [159, 99], [0, 99]])).all(axis=(1, 2))
    assert abs(still.mean() - 0.3) < 0.02
    assert corners[:, 0].max(axis=0).tolist() == [32, 20]
    assert corners[:, 2].min(axis=0).tolist() == [159 - 32, 99 - 20]


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


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomHorizontalFlip(1.5), "p: expected"),
        (lambda: RandomHorizontalFlip(float("nan")), "p: expected"),
        (lambda: RandomAffine(float("inf")), "degrees: expected a finite number"),
        (lambda: RandomAffine(3, scale=(1.0, float("nan"))), "scale: expected a finite number"),
        (lambda: augment.scale_color(photos()[0], 2.0), "images: expected"),
        (lambda: RandomAffine(-1), "degrees"),
        (lambda: RandomAffine((3, 1)), "degrees"),
        (lambda: RandomAffine(3, (0.1, 1.2)), "translate"),
        (lambda: RandomAffine(3, scale=(0, 1)), "scale"),
        (lambda: RandomAffine(3, shear=(1, 2, 3)), "shear"),
        (lambda: RandomAffine(3, interpolation="cubic"), "interpolation"),
        (lambda: RandomRotation(3, expand=True, center=(1, 1)), "expand, center"),
        (lambda: RandomCrop(0), "size"),
        (lambda: RandomCrop(3, padding=(1, 2, 3)), "padding"),
        (lambda: RandomCrop(3, padding_mode="wrap"), "padding_mode"),
        (lambda: RandomResizedCrop(3, scale=(0.5, 0.1)), "scale"),
        (lambda: Resize((3, 4), max_size=9), "max_size"),
        (lambda: Resize(None), "size, max_size"),
        (lambda: ColorJitter(-1), "brightness"),
        (lambda: ColorJitter(contrast=(-1, 1)), "contrast"),
        (lambda: ColorJitter(hue=0.6), "hue"),
        (lambda: Normalize([0.5], [0.5, 0.5]), "mean, std"),
        (lambda: Normalize([0.5], [0.0]), "std"),
        (lambda: RandomCrop(30)(photos()), "larger than the padded image"),
        (lambda: RandomHorizontalFlip()(torch.zeros(2, 2)), "images"),
        (lambda: RandomHorizontalFlip()(np.zeros(3)), "images"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2)), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, range(5))), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, [0.5] * 6)), "key"),
        (lambda: RandomHorizontalFlip()(photos(), key=(1, 2, range(6)), generator=torch.Generator()), "generator, key"),
    ],
)
def test_bad_values_name_the_argument(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomHorizontalFlip("often"), "p: expected a number"),
        (lambda: RandomAffine("much"), "degrees: expected"),
        (lambda: RandomAffine(3, scale=1.5), "scale: expected two numbers"),
        (lambda: RandomAffine(3, fill=["black"]), "fill: expected a number"),
        (lambda: RandomResizedCrop(None), "size: expected"),
        (lambda: RandomResizedCrop(8, ratio=("a", "b")), "ratio: expected a number"),
        (lambda: CenterCrop(2.5), "size: expected"),
        (lambda: ColorJitter("bright"), "brightness: expected"),
        (lambda: RandAugment()(photos().float() / 255), "images: expected uint8"),
        (lambda: RandAugment(num_ops=1.5), "num_ops: expected an integer"),
        (lambda: RandAugment(magnitude="strong"), "magnitude: expected an integer"),
        (lambda: Resize("large"), "size: expected"),
        (lambda: Normalize(0.5, 0.5), "mean: expected one number per channel"),
        (lambda: Normalize([0.5], ["a"]), "std: expected a number"),
        (lambda: RandomErasing()(photos().int()), "images: expected uint8 or a floating dtype"),
        (lambda: RandomErasing()(np.zeros((4, 4, 3), np.int64)), "images: expected uint8 or a floating dtype"),
        (lambda: RandomVerticalFlip()(photos(), generator=5), "generator: expected a torch.Generator"),
        (lambda: augment.MixUp(alpha="a"), "alpha: expected a number"),
        (lambda: augment.CutMix(num_classes=2.5), "num_classes: expected an integer"),
        (lambda: augment.rgb_to_hsv(photos()), "images: expected a floating dtype"),
        (lambda: augment.scale_color(photos().int(), 2.0), "images: expected uint8"),
    ],
)
def test_wrong_types_name_the_argument(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def test_bad_types_name_the_argument():
    with pytest.raises(TypeError, match="images"):
        RandomHorizontalFlip()([1, 2])
    with pytest.raises(TypeError, match="transforms"):
        Compose([torch.nn.ReLU()])
    with pytest.raises(TypeError, match="dtype"):
        Normalize([0.5], [0.5], dtype=torch.uint8)


def test_a_replay_compiles_into_one_graph():
    images, aug = photos(), training_recipe()

    def replay(images: torch.Tensor, params: augment.Params) -> torch.Tensor:
        return aug.transform(images, params) * 2

    compiled = torch.compile(replay, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        params = aug.make_params(images, key=(0, epoch, range(6)))
        torch.testing.assert_close(compiled(images, params), replay(images, params), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arrangement", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "transforms",
    [
        [RandomErasing(p=0.7, value="random", inplace=True)],
        [RandAugment()],
        [TrivialAugmentWide()],
        [
            RandomResizedCrop(24),
            RandAugment(3, 12),
            Normalize([0.5] * 3, [0.2] * 3, dtype=torch.bfloat16),
            RandomErasing(p=1),
        ],
    ],
    ids=["erasing", "randaugment", "trivialaugment", "all"],
)
def test_what_decides_by_values_compiles_into_one_graph(transforms, arrangement):
    images = photos().contiguous(memory_format=arrangement)
    aug = copy.deepcopy(Compose(transforms))

    def replay(images: torch.Tensor, params: augment.Params) -> torch.Tensor:
        return aug.transform(images, params) + 1

    compiled = torch.compile(replay, fullgraph=True, backend="aot_eager")
    for epoch in range(3):
        params = aug.make_params(images, key=(0, epoch, range(6)))
        before = images.clone()
        ours = compiled(images, params)
        assert torch.equal(images, before)
        expected = replay(images.clone(memory_format=torch.preserve_format), params)
        assert ours.stride() == expected.stride()
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [1, 6])
def test_a_call_compiles_into_one_graph(size):
    """Draws and all, with keys of every form that a call takes, a batch and one image."""
    images, aug = photos(size), Compose([RandAugment(), *training_recipe().transforms, RandomErasing(1.0)])

    def call(images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor) -> torch.Tensor:
        return aug(images, key=(seed, epoch, index)) * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed, epoch in ((0, 3), (2**64 - 5, 4), (7, 5)):
        index = torch.arange(size) + 10 * epoch
        assert torch.equal(compiled(images, seed, epoch, index), call(images, seed, epoch, index))
    assert len(set(map(float, (compiled(images, s, 0, torch.arange(size)).sum() for s in range(4))))) == 4
    one = torch.compile(lambda image: aug(image, key=(1, 2, 3)), fullgraph=True, backend="aot_eager")
    assert torch.equal(one(images[0]), aug(images[0], key=(1, 2, 3)))
    listed = torch.compile(lambda x: aug(x, key=(1, 2, range(size))), fullgraph=True, backend="aot_eager")
    assert torch.equal(listed(images), aug(images, key=(1, 2, range(size))))


def test_opcheck_of_the_operations_that_stand_for_a_pipeline():
    images, aug = photos(4), Compose([RandomAffine(20), RandAugment(), Normalize(MEAN, STD)])
    ops = torch.ops.imgopt_fast
    torch.library.opcheck(ops.augment_keyed.default, (images, 3, 1, torch.arange(4), aug.number))
    names = ["0:angle", "1:operation", "1:magnitude"]
    values = [torch.rand(4).double(), torch.randint(0, 14, (4, 2)), torch.rand(4, 2).double()]
    torch.library.opcheck(ops.augment.default, (images, names, values, aug.number))
    structure = ("test_schema", "test_faketensor")  # the others compare two calls, which draw anew
    torch.library.opcheck(ops.augment_seeded.default, (images, aug.number), test_utils=structure)


def test_a_compiled_call_without_a_key_draws_from_torchs_generator():
    images, aug = photos(), training_recipe()
    compiled = torch.compile(lambda x: (aug(x), aug(x)), fullgraph=True, backend="aot_eager")
    torch.manual_seed(9)
    first, second = compiled(images)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(aug(images), first)
    assert torch.equal(aug(images), second)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at one
def test_a_compiled_call_with_a_generator_or_a_gradient_leaves_the_graph():
    images, aug = photos().double() / 255, Compose([RandomHorizontalFlip(), RandomAffine(10)])
    compiled = torch.compile(lambda x: aug(x, key=(0, 3, range(6))) * 2, backend="eager")
    leaf = images.clone().requires_grad_()
    result = compiled(leaf)
    torch.testing.assert_close(result, aug(images, key=(0, 3, range(6))) * 2)
    result.sum().backward()
    assert leaf.grad is not None
    generator = torch.Generator().manual_seed(4)
    drawn = torch.compile(lambda x: aug(x, generator=generator) * 2, backend="eager")(images)
    assert torch.equal(drawn, aug(images, generator=generator.manual_seed(4)) * 2)


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
