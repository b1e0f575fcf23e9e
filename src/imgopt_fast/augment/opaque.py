"""A whole pipeline as one operation of a compiled graph.

No graph can hold the draws, whose generator multiplies to 64 bits, nor the transforms that decide by the values drawn
what there is to do (which samples of a policy are sharpened, which rectangle is overwritten). Inside `torch.compile` a
call of a pipeline, and a replay with such a transform, run as they do outside, behind operations that the compiler does
not look into, so that the graph around them stays whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from imgopt_fast.ops import registration

if TYPE_CHECKING:
    from imgopt_fast.augment.transform import Draw, Key, Transform

_PIPELINES: WeakValueDictionary[int, Transform] = WeakValueDictionary()
_NUMBERS = itertools.count()


def number(pipeline: Transform) -> int:
    """A number under which the operation finds `pipeline` for as long as it lives."""
    found = next(_NUMBERS)
    _PIPELINES[found] = pipeline
    return found


def call(pipeline: Transform, images: torch.Tensor, key: Key | None) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters of `key`, or of torch's generator, in one operation."""
    if key is None:
        return _seeded_op(images, pipeline.number)  # type: ignore[no-any-return]
    seed, epoch, index = key
    if not isinstance(index, torch.Tensor):
        index = torch.tensor([index] if isinstance(index, int) else list(index))
    signed = ((int(seed) + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)  # 64 bits, as the generator's, but with a sign
    return _keyed_op(images, signed, epoch, index, pipeline.number)  # type: ignore[no-any-return]


def replay(pipeline: Transform, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters `draws` of its transforms, in one operation."""
    names = [f"{i}:{name}" for i, draw in enumerate(draws) for name in draw]
    values = [torch.from_numpy(value) for draw in draws for value in draw.values()]
    return _replay_op(images, names, values, pipeline.number)  # type: ignore[no-any-return]


def _seeded(images: torch.Tensor, number: int) -> torch.Tensor:
    return _finished(_PIPELINES[number], images, None, None)


def _keyed(images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, number: int) -> torch.Tensor:
    return _finished(_PIPELINES[number], images, (seed, epoch, index), None)


def _replayed(images: torch.Tensor, names: Sequence[str], values: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    pipeline = _PIPELINES[number]
    draws: list[Draw] = [{} for _ in pipeline.leaves()]
    for name, value in zip(names, values, strict=True):
        place, _, parameter = name.partition(":")
        draws[int(place)][parameter] = value.cpu().numpy()
    return _finished(pipeline, images, None, draws)


def _finished(pipeline: Transform, images: torch.Tensor, key: Key | None, draws: Sequence[Draw] | None) -> torch.Tensor:
    """The result, in new memory (an operation neither writes to its input nor returns it) and the layout of `_fake`."""
    if draws is None:
        draws = pipeline.make_params(images, key=key).draws
    source = images.clone() if any(getattr(leaf, "inplace", False) for leaf in pipeline.leaves()) else images
    result = pipeline.carry_out(source, draws).contiguous(memory_format=_layout(images))
    return result.clone() if result.data_ptr() == images.data_ptr() else result


def _fake(images: torch.Tensor, *rest: Any) -> torch.Tensor:
    pipeline, dtype = _PIPELINES[rest[-1]], images.dtype
    for leaf in pipeline.leaves():
        dtype = leaf.output_dtype(dtype)
    size = pipeline.output_size((images.shape[2], images.shape[3]))
    return torch.empty((*images.shape[:2], *size), dtype=dtype, device=images.device, memory_format=_layout(images))


def _layout(images: torch.Tensor) -> torch.memory_format:
    interleaved = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if interleaved else torch.contiguous_format


# Random, so that the compiler neither merges two calls nor drops one.
_seeded_op = registration.register(
    "augment_seeded(Tensor images, int number) -> Tensor",
    reference=_seeded,
    fallback=None,
    fake=_fake,
    tags=(torch.Tag.nondeterministic_seeded,),
)
_keyed_op = registration.register(
    "augment_keyed(Tensor images, SymInt seed, SymInt epoch, Tensor index, int number) -> Tensor",
    reference=_keyed,
    fallback=None,
    fake=_fake,
)
_replay_op = registration.register(
    "augment(Tensor images, str[] names, Tensor[] values, int number) -> Tensor",
    reference=_replayed,
    fallback=None,
    fake=_fake,
)
