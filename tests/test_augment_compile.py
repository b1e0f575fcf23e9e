"""Pipelines under torch.compile: draws and transforms stay in one graph."""

import copy

import pytest
import torch
from pipelines import MEAN, STD, photos, training_recipe

from imgopt_fast import augment
from imgopt_fast.augment import (
    ColorJitter,
    Compose,
    Normalize,
    RandAugment,
    RandomAffine,
    RandomErasing,
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at one
def test_opcheck_of_the_operations_that_stand_for_a_pipeline():
    images, aug = photos(4), Compose([RandomAffine(20), RandAugment(), Normalize(MEAN, STD)])
    ops, seed, index = torch.ops.imgopt_fast, torch.tensor(3), torch.arange(4)
    torch.library.opcheck(ops.augment_keyed.default, (images, seed, 1, index, aug.number))
    names = ["0:angle", "1:operation", "1:magnitude"]
    values = [torch.rand(4).double(), torch.randint(0, 14, (4, 2)), torch.rand(4, 2).double()]
    torch.library.opcheck(ops.augment.default, (images, names, values, aug.number))
    leaf, soft = photos(4).double().requires_grad_(), Compose([RandomAffine(20, interpolation="bilinear")])
    torch.library.opcheck(ops.augment_keyed.default, (leaf, seed, 1, index, soft.number))
    torch.library.opcheck(ops.augment.default, (leaf, ["0:angle"], values[:1], soft.number))
    structure = ("test_schema", "test_faketensor")  # the others compare two calls, which draw anew
    torch.library.opcheck(ops.augment_seed.default, (index, None), test_utils=structure)


def test_a_compiled_call_without_a_key_draws_from_torchs_generator():
    images, aug = photos(), training_recipe()
    compiled = torch.compile(lambda x: (aug(x), aug(x)), fullgraph=True, backend="aot_eager")
    torch.manual_seed(9)
    first, second = compiled(images)
    assert not torch.equal(first, second)
    torch.manual_seed(9)
    assert torch.equal(aug(images), first)
    assert torch.equal(aug(images), second)


def test_a_compiled_call_draws_from_a_generator():
    images, aug = photos(), training_recipe()
    compiled = torch.compile(
        lambda x, g: (aug(x, generator=g), aug(x, generator=g)), fullgraph=True, backend="aot_eager"
    )
    one, other = torch.Generator(), torch.Generator()
    for generator, seed in ((one, 4), (other, 5), (one, 6)):
        first, second = compiled(images, generator.manual_seed(seed))
        assert not torch.equal(first, second)
        generator.manual_seed(seed)
        assert torch.equal(aug(images, generator=generator), first)
        assert torch.equal(aug(images, generator=generator), second)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at one
@pytest.mark.parametrize("drawn_by", ["key", "generator", "torch"])
@pytest.mark.parametrize("arrangement", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_call_passes_gradients_on(drawn_by, arrangement):
    """Through a graph without a break, whose result has the bits of the call of images that need none."""
    images = (photos() / 255).contiguous(memory_format=arrangement)
    color = ColorJitter(0.3, 0.3, 0.3, 0.1)
    warp = RandomAffine(15, interpolation="bilinear")
    aug = Compose([warp, color, Normalize(MEAN, STD), RandomErasing(1.0, inplace=True)])
    generator = torch.Generator()

    def call(images: torch.Tensor) -> torch.Tensor:
        options = {"key": {"key": (0, 3, range(6))}, "generator": {"generator": generator}, "torch": {}}[drawn_by]
        return (aug(images * 2, **options) * 3).square()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaf = images.clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(7)
        generator.manual_seed(7)
        output = function(leaf)
        output.sum().backward()
        results.append((output.detach(), leaf.grad))
    for outside, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)
    assert results[0][1].abs().sum() > 0
    torch.manual_seed(7)
    generator.manual_seed(7)
    assert torch.equal(results[1][0], call(images))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at one
@pytest.mark.parametrize("erases", [False, True])
def test_a_compiled_replay_passes_gradients_on(erases):
    images = photos().double() / 255
    warp = RandomAffine(15, interpolation="bilinear")
    aug = Compose([warp, ColorJitter(0.3, 0.3, 0.3), *[RandomErasing(1.0)] * erases])
    params = aug.make_params(images, key=(0, 1, range(6)))
    compiled = torch.compile(lambda x: aug.transform(x, params).square(), fullgraph=True, backend="aot_eager")
    inside, outside = images.clone().requires_grad_(), images.clone().requires_grad_()
    compiled(inside).sum().backward()
    aug.transform(outside, params).square().sum().backward()
    torch.testing.assert_close(inside.grad, outside.grad)


def test_what_cannot_be_compiled_names_the_way_out():
    images, aug = photos(), RandomAffine(15)
    compiled = torch.compile(lambda x: aug.make_params(x, key=(0, 0, range(6))), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="or call the transform itself"):
        compiled(images)
