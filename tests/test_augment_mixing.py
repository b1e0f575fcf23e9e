"""MixUp, CutMix and RandomErasing: formulas per sample, distributions, and keys."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from imgopt_fast.augment import Compose, CutMix, MixUp, Normalize, RandomErasing, RandomHorizontalFlip, mixing


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0])
def test_symmetric_beta(alpha):
    share = mixing.symmetric_beta(np.random.default_rng(1).random((4, 20000)), alpha)
    assert np.isfinite(share).all()
    assert stats.kstest(share, stats.beta(alpha, alpha).cdf).statistic < 0.0138  # P < 1e-3 at 20000 samples
    extreme = mixing.symmetric_beta(np.random.default_rng(1).random((4, 1000)), 0.01)
    assert ((extreme >= 0) & (extreme <= 1)).all()
    edge = mixing.symmetric_beta(np.array([[0.0, 1 - 2**-32], [0.0, 0.5], [0.0, 1 - 2**-32], [1 - 2**-32, 0.0]]), alpha)
    assert ((edge >= 0) & (edge <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_mixup(dtype):
    images = torch.randint(0, 256, (5, 3, 6, 7)).to(dtype)
    targets = torch.tensor([0, 3, 1, 2, 2])
    mix = MixUp(alpha=0.7, num_classes=4)
    params = mix.make_params(images, key=(1, 0, range(5)))
    mixed, soft = mix.transform(images, targets, params)
    assert mixed.dtype == dtype
    for i in range(5):
        share = params.draws[0]["share"][i]
        expected = share * images[i].double() + (1 - share) * images[i - 1].double()
        tolerance = {torch.uint8: 0.501, torch.bfloat16: 1.0, torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
        assert (mixed[i].double() - expected).abs().max() <= tolerance
        target = share * torch.eye(4)[targets[i]] + (1 - share) * torch.eye(4)[targets[i - 1]]
        torch.testing.assert_close(soft[i], target)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mix", [MixUp(num_classes=3), CutMix(num_classes=3)], ids=["mixup", "cutmix"])
def test_samples_mixed_a_few_at_a_time_are_those_of_the_whole_batch(mix, layout, monkeypatch):
    images, targets = torch.randint(0, 256, (7, 3, 30, 41), dtype=torch.uint8), torch.arange(7) % 3
    images = images.contiguous(memory_format=layout)
    monkeypatch.setattr(mixing, "_CACHED", 8000)
    few = mix(images, targets, key=(3, 1, range(7)))[0]
    monkeypatch.setattr(mixing, "_walked", lambda images: False)
    assert torch.equal(few, mix(images, targets, key=(3, 1, range(7)))[0])
    assert few.is_contiguous(memory_format=layout)


def test_cutmix():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).repeat(1, 3, 20, 30)
    targets = torch.eye(6)
    cut = CutMix(alpha=1.0)
    params = cut.make_params(images, key=(1, 0, range(6)))
    mixed, soft = cut.transform(images, targets, params)
    for i in range(6):
        drawn = {k: v[i] for k, v in params.draws[0].items()}
        top, bottom, left, right = (int(drawn[k]) for k in ("top", "bottom", "left", "right"))
        expected = images[i].clone()
        expected[:, top:bottom, left:right] = (i - 1) % 6
        assert torch.equal(mixed[i], expected)
        assert drawn["share"] == pytest.approx((expected[0] == i).double().mean().item())
        assert soft[i, i] == pytest.approx(drawn["share"])
        assert soft[i, i - 1] == pytest.approx(1 - drawn["share"])


def test_cut_areas_follow_the_beta_distribution():
    images = torch.empty(1, 1, 1, 1).expand(20000, 1, 1000, 1000)
    draw = CutMix(alpha=1.0).make_params(images, key=(4, 0, range(20000))).draws[0]
    inside = (draw["top"] > 0) & (draw["left"] > 0) & (draw["bottom"] < 1000) & (draw["right"] < 1000)
    assert abs(inside.mean() - 1 / 6) < 0.015  # the integral of (1 - sqrt(area))² over uniform areas
    area = ((draw["bottom"] - draw["top"]) * (draw["right"] - draw["left"]))[inside] / 1e6
    assert abs(np.median(area) - 0.1488) < 0.02  # where the integral reaches 1/12


def test_mixing_is_keyed_per_sample_and_apart_from_the_pipeline():
    images = torch.rand(8, 3, 4, 4)
    for mix in (MixUp(num_classes=3), CutMix(num_classes=3)):
        share = mix.make_params(images, key=(1, 5, range(8))).draws[0]["share"]
        again = mix.make_params(images[:3], key=(1, 5, [6, 2, 4])).draws[0]["share"]
        assert again.tolist() == share[[6, 2, 4]].tolist()
    assert MixUp().position != CutMix().position
    torch.manual_seed(0)
    first = MixUp(num_classes=2)(images, torch.zeros(8, dtype=torch.long))[0]
    torch.manual_seed(0)
    assert torch.equal(MixUp(num_classes=2)(images, torch.zeros(8, dtype=torch.long))[0], first)


@pytest.mark.parametrize("mix", [MixUp(num_classes=3), CutMix(num_classes=3)], ids=["mixup", "cutmix"])
def test_a_replay_of_mixing_compiles_into_one_graph(mix):
    images, targets = torch.rand(6, 3, 8, 9), torch.tensor([0, 1, 2, 0, 1, 2])
    compiled = torch.compile(mix.transform, fullgraph=True, backend="aot_eager")
    for epoch in range(2):
        params = mix.make_params(images, key=(0, epoch, range(6)))
        for ours, expected in zip(
            compiled(images, targets, params), mix.transform(images, targets, params), strict=True
        ):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("mix", [MixUp(num_classes=3), CutMix(num_classes=3)], ids=["mixup", "cutmix"])
def test_a_call_of_mixing_compiles_into_one_graph(mix):
    """Draws and all, with a key or by torch's generator; a copy draws the same."""
    images, targets = torch.rand(6, 3, 8, 9), torch.tensor([0, 1, 2, 0, 1, 2])
    mix = copy.deepcopy(mix)

    def call(images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed, soft = mix(images * 1.0, targets, key=(seed, epoch, index))
        return mixed + 1, soft

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed, epoch in ((0, 3), (2**64 - 5, 4), (7, 5)):
        index = torch.arange(6) + 10 * epoch
        for ours, expected in zip(compiled(images, seed, epoch, index), call(images, seed, epoch, index), strict=True):
            torch.testing.assert_close(ours, expected)
    twice = torch.compile(lambda x: (mix(x, targets)[0], mix(x, targets)[0]), fullgraph=True, backend="aot_eager")
    torch.manual_seed(9)
    first, second = twice(images)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    torch.testing.assert_close(mix(images, targets)[0], first)
    torch.testing.assert_close(mix(images, targets)[0], second)
    generator = torch.Generator().manual_seed(9)
    drawn = torch.compile(lambda x: mix(x, targets, generator=generator), fullgraph=True, backend="aot_eager")(images)
    expected = mix(images, targets, generator=generator.manual_seed(9))
    torch.testing.assert_close(drawn, expected)
    drawn = torch.ops.imgopt_fast.augment_draws.default
    torch.library.opcheck(drawn, (images, torch.tensor(3), 1, torch.arange(6), mix.number))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at one
def test_a_compiled_mixing_passes_gradients_on():
    images, targets = torch.rand(4, 3, 5, 6), torch.tensor([0, 1, 2, 0])
    mix, key = MixUp(num_classes=3), (0, 1, range(4))
    leaf, other = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.compile(lambda x: mix(x, targets, key=key)[0].square().sum(), backend="aot_eager")(leaf).backward()
    mix(other, targets, key=key)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


def test_mixing_names_bad_arguments():
    images, targets = torch.rand(4, 3, 5, 5), torch.zeros(4, dtype=torch.long)
    for call, text in (
        (lambda: MixUp(alpha=0), "alpha"),
        (lambda: MixUp()(images, targets), "num_classes"),
        (lambda: CutMix(num_classes=2)(images, targets[:3]), "targets"),
        (lambda: MixUp(num_classes=2).transform(images, targets, MixUp().make_params(images[:2])), "images"),
        (lambda: CutMix(num_classes=2)(images, torch.zeros(4)), "targets"),
        (lambda: MixUp(num_classes=2)(images[0], targets), "images"),
        (lambda: MixUp(num_classes=2)(images, targets + 2), "targets: expected class indices from 0 to 1"),
        (lambda: MixUp(num_classes=2)(images, targets - 1), "targets: expected class indices from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


# ---------------------------------------------------------------------------------------------------- erasing


def test_erasing():
    images = torch.rand(40, 3, 20, 30)
    aug = RandomErasing(0.7, value=(7.0, 8.0, 9.0))
    params = aug.make_params(images, key=(0, 0, range(40)))
    before = images.clone()
    result = aug.transform(images, params)
    assert torch.equal(images, before)
    erased = 0
    for i in range(40):
        ((_, drawn),) = params.sample(i)
        top, left, height, width = (drawn[k] for k in ("top", "left", "height", "width"))
        expected = images[i].clone()
        expected[:, top : top + height, left : left + width] = torch.tensor([7.0, 8.0, 9.0])[:, None, None]
        assert torch.equal(result[i], expected)
        erased += height > 0
        assert height == 0 or 0.01 < height * width / 600 < 0.36
    assert 18 <= erased <= 38
    assert RandomErasing(1.0, inplace=True)(images) is images
    assert not torch.equal(images, before)


def test_erasing_after_normalisation_writes_into_the_new_memory():
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    before = images.clone()
    aug = Compose([RandomHorizontalFlip(), Normalize([0.5] * 3, [0.5] * 3), RandomErasing(1.0)])
    result = aug(images, key=(0, 0, range(6)))
    assert torch.equal(images, before)
    assert (result == 0).flatten(1).any(1).all()
    assert torch.equal(aug(images[4], key=(0, 0, 4)), result[4])


def test_erasing_with_noise():
    images = torch.zeros(3, 3, 90, 90)
    aug = RandomErasing(1.0, scale=(0.3, 0.33), ratio=(0.9, 1.1), value="random")
    result = aug(images, key=(0, 0, range(3)))
    noise = [plane[plane != 0] for plane in result]
    for sample in noise:
        assert sample.numel() > 3 * 0.28 * 8100
        assert stats.kstest(sample.numpy(), stats.norm.cdf).statistic < 0.02
    assert not torch.equal(noise[0][:100], noise[1][:100])
    assert torch.equal(aug(images[2], key=(0, 0, 2)), result[2])
    levels = aug(torch.zeros(1, 3, 90, 90, dtype=torch.uint8), key=(0, 0, [0]))
    assert stats.kstest(levels[levels > 0].numpy(), stats.uniform(0, 256).cdf).statistic < 0.02


def test_erasing_where_nothing_fits():
    images = torch.rand(5, 1, 4, 4)
    assert torch.equal(RandomErasing(1.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))(images), images)
    for make, text in (
        (lambda: RandomErasing(scale=(0.1, 2.0)), "scale"),
        (lambda: RandomErasing(ratio=(0.0, 2.0)), "ratio"),
        (lambda: RandomErasing(value="noise"), "value"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
