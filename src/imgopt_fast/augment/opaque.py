"""A whole pipeline as one operation of a compiled graph.

Some transforms decide by the values that were drawn what there is to do (which samples of a policy are sharpened, which
rectangle is overwritten): no graph can hold that. Inside `torch.compile` a pipeline with such a transform runs as it
does outside, behind an operation that the compiler does not look into, so that the graph around it stays whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from imgopt_fast.ops import registration

if TYPE_CHECKING:
    from imgopt_fast.augment.transform import Draw, Transform

_PIPELINES: WeakValueDictionary[int, Transform] = WeakValueDictionary()
_NUMBERS = itertools.count()


def number(pipeline: Transform) -> int:
    """A number under which the operation finds `pipeline` for as long as it lives."""
    found = next(_NUMBERS)
    _PIPELINES[found] = pipeline
    return found


def call(pipeline: Transform, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters `draws` of its transforms, in one operation."""
    names = [f"{i}:{name}" for i, draw in enumerate(draws) for name in draw]
    values = [torch.from_numpy(value) for draw in draws for value in draw.values()]
    return _op(images, names, values, pipeline.number)  # type: ignore[no-any-return]


def _run(images: torch.Tensor, names: Sequence[str], values: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    pipeline = _PIPELINES[number]
    leaves = pipeline.leaves()
    draws: list[Draw] = [{} for _ in leaves]
    for name, value in zip(names, values, strict=True):
        place, _, parameter = name.partition(":")
        draws[int(place)][parameter] = value.cpu().numpy()
    # An operation neither writes to its input nor returns it.
    source = images.clone() if any(getattr(leaf, "inplace", False) for leaf in leaves) else images
    result = pipeline.carry_out(source, draws).contiguous(memory_format=_layout(images))
    return result.clone() if result.data_ptr() == images.data_ptr() else result


def _fake(images: torch.Tensor, names: Sequence[str], values: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    pipeline, dtype = _PIPELINES[number], images.dtype
    for leaf in pipeline.leaves():
        dtype = leaf.output_dtype(dtype)
    size = pipeline.output_size((images.shape[2], images.shape[3]))
    return torch.empty((*images.shape[:2], *size), dtype=dtype, device=images.device, memory_format=_layout(images))


def _layout(images: torch.Tensor) -> torch.memory_format:
    interleaved = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if interleaved else torch.contiguous_format


_op = registration.register(
    "augment(Tensor images, str[] names, Tensor[] values, int number) -> Tensor",
    reference=_run,
    fallback=None,
    fake=_fake,
)
