"""Pipelines under torch.compile: draws and transforms stay in one graph."""

import copy

import pytest
import torch
from pipelines import MEAN, STD, photos, training_recipe

from imgopt_fast import augment
from imgopt_fast.augment import (
    Compose,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    TrivialAugmentWide,
)


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
