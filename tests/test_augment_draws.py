"""What a pipeline draws: keyed per sample, the same in every batch, worker and version, as the statistics say."""

import numpy as np
import pytest
import torch
from pipelines import photos, training_recipe

from imgopt_fast import augment
from imgopt_fast.augment import (
    ColorJitter,
    Compose,
    RandAugment,
    RandomAffine,
    RandomCrop,
    RandomErasing,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomPerspective,
    RandomResizedCrop,
    RandomRotation,
    TrivialAugmentWide,
)


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


@pytest.mark.parametrize("side", [1, 2, 3, 8, 32])
def test_perspective_has_a_map_for_every_draw(side):
    """With corners moved to the middle, three of them may come to lie on one line."""
    images = photos(1, 3, side, side).expand(500, -1, -1, -1)
    aug, still = RandomPerspective(1.0, 1.0), [[0, 0], [side - 1, 0], [side - 1, side - 1], [0, side - 1]]
    params = aug.make_params(images, key=(0, 0, range(500)))
    result = aug.transform(images, params)
    corners = torch.from_numpy(params.draws[0]["corners"])
    moved = aug.transform_keypoints(torch.tensor(still, dtype=torch.float64).expand(500, -1, -1), params)
    torch.testing.assert_close(moved, corners, atol=1e-9, rtol=0)
    unmoved = (corners == torch.tensor(still)).all(dim=(1, 2))
    assert 0 < unmoved.sum() < (501 if side == 1 else 500)
    assert torch.equal(result[unmoved], images[unmoved])


def test_an_empty_batch_has_an_empty_key():
    assert training_recipe()(photos()[:0], key=(0, 0, [])).shape == (0, 3, 20, 24)


def test_perspective_moves_corners_inwards():
    corners = draws(RandomPerspective(0.4, 0.7))["corners"]
    still = (corners == np.array([[0, 0], [159, 0], [159, 99], [0, 99]])).all(axis=(1, 2))
    assert abs(still.mean() - 0.3) < 0.02
    assert corners[:, 0].max(axis=0).tolist() == [32, 20]
    assert corners[:, 2].min(axis=0).tolist() == [159 - 32, 99 - 20]
