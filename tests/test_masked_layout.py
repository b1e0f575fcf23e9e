"""From a mask to row quads: every entry once, the same from both builders, what a mask is recognised as."""

import numpy as np
import pytest
import torch
from conftest import BACKEND
from masked_problems import STRUCTURES, adversarial_masks, random_mask, structured_mask
from torch import Tensor

from imgopt_fast import _native
from imgopt_fast.ops.masked_matmul import mask_layout, masked_matmul, pack_masked_weight, reference


@pytest.mark.parametrize("block", [1, 3, 128, 256, 300])
def test_structure_holds_every_entry_once(block: int) -> None:
    for name, mask in adversarial_masks().items():
        quads, columns, position = map(torch.from_numpy, reference.structure(mask.numpy(), block))
        row, column = reference.entries(quads, columns, block)
        real = position >= 0
        assert torch.equal(position[real].long(), (row * mask.shape[1] + column)[real]), name
        rebuilt = torch.zeros_like(mask)
        rebuilt.view(-1)[position[real].long()] = True
        assert torch.equal(rebuilt, mask), name
        assert int(real.sum()) == int(mask.sum()), name


@pytest.mark.skipif(BACKEND != "native", reason="compares with the compiled builder")
@pytest.mark.parametrize("block", [1, 3, 128, 256, 300])
def test_compiled_structure_is_the_reference(block: int) -> None:
    masks = [*adversarial_masks().values(), torch.zeros(0, 5, dtype=torch.bool), torch.zeros(5, 0, dtype=torch.bool)]
    for mask in masks:
        compiled = _native.core().mask_structure(mask.numpy(), block)  # type: ignore[union-attr]
        for ours, theirs in zip(compiled, reference.structure(mask.numpy(), block), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_packed_weight_is_small() -> None:
    mask = random_mask(512, 512, 0.1)
    packed = pack_masked_weight(torch.randn(512, 512), mask)
    size = sum(t.numel() * t.element_size() for t in packed if isinstance(t, Tensor))
    assert size < 0.25 * 512 * 512 * 4


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_is_recognised(name: str) -> None:
    mask = structured_mask(name, 0.3, (64, 96))
    assert mask_layout(mask).structure_name == name
    assert pack_masked_weight(torch.randn(64, 96), mask).structure_name == name
    spoilt = mask.clone()
    spoilt[5, 7] = ~spoilt[5, 7]
    assert mask_layout(spoilt).structure_name == "free"
    image = mask.view(64, 2, 2, 24).permute(0, 3, 1, 2)  # columns of a convolution: taps, with channels side by side
    assert mask_layout(image).structure_name == name


def test_other_structures() -> None:
    assert mask_layout(torch.ones(16, 16, dtype=torch.bool)).structure_name == "dense"
    for mask in (torch.zeros(16, 16, dtype=torch.bool), torch.eye(16, dtype=torch.bool), random_mask(64, 64, 0.5)):
        assert mask_layout(mask).structure_name == "free"


@pytest.mark.parametrize("name", ["4x1", "8x1", "16x1", "4x4", "16x16", "2:4", "1:4"])
def test_structures_whose_last_blocks_are_cut_off(name: str) -> None:
    """As pruning leaves them in layers of odd sizes, such as a classifier of ten classes."""
    mask = structured_mask(name, 0.3, (64, 96))[:-2, :-2]
    if ":" in name:
        mask[:, -2] = True  # the rest of the last neighbours has as many as it can
        mask[:, -1] = name == "2:4"
    assert mask_layout(mask).structure_name == name
    spoilt = mask.clone()
    spoilt[-1, -1] = ~spoilt[-1, -1]
    assert mask_layout(spoilt).structure_name == "free"
    assert mask_layout(torch.ones(1, 8, dtype=torch.bool).tril()).structure_name == "free", "less than one block"


def test_layouts_are_tensors_and_ints_that_a_compiled_function_takes() -> None:
    x, weight, mask = torch.randn(3, 16), torch.randn(8, 16), structured_mask("2:4", 0.5, (8, 16))
    packed, made = pack_masked_weight(weight, mask), mask_layout(mask)
    for value in [*packed, *made]:
        assert value is None or isinstance(value, (Tensor, int)) or all(isinstance(size, int) for size in value)
    torch._dynamo.reset()
    for args in ((x, packed), (x, weight, made)):
        compiled = torch.compile(masked_matmul, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), masked_matmul(*args))  # type: ignore[arg-type]
