"""A whole pipeline as one operation of a compiled graph.

No graph can hold the draws, whose generator multiplies to 64 bits, nor the transforms that decide by the values drawn
what there is to do (which samples of a policy are sharpened, which rectangle is overwritten). Inside `torch.compile` a
call of a pipeline, a replay with such a transform, and the draws of MixUp and CutMix run as they do outside, behind
operations that the compiler does not look into, so that the graph around them stays whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from imgopt_fast.ops import registration

if TYPE_CHECKING:
    from imgopt_fast.augment.mixing import Mixing
    from imgopt_fast.augment.transform import Draw, Key, Transform

_NUMBERED: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


class Numbered(torch.nn.Module):
    """A module with a number under which the operations find it for as long as it lives; a copy gets one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._enter()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._enter()

    def _enter(self) -> None:
        self.number = next(_NUMBERS)
        _NUMBERED[self.number] = self


# ---------------------------------------------------------------------------------------------------- entries


def call(pipeline: Transform, images: torch.Tensor, key: Key | None) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters of `key`, or of torch's generator, in one operation."""
    if key is None:
        return _seeded_op(images, pipeline.number)  # type: ignore[no-any-return]
    return _keyed_op(images, *_arguments(key), pipeline.number)  # type: ignore[no-any-return]


def replay(pipeline: Transform, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters `draws` of its transforms, in one operation."""
    names = [f"{i}:{name}" for i, draw in enumerate(draws) for name in draw]
    values = [torch.from_numpy(value) for draw in draws for value in draw.values()]
    return _replay_op(images, names, values, pipeline.number)  # type: ignore[no-any-return]


def draws(mixing: Mixing, images: torch.Tensor, key: Key | None) -> dict[str, torch.Tensor]:
    """What `mixing` draws for a batch of images by `key`, or by torch's generator, in one operation: (N,) float64."""
    shape = images.detach()  # nothing else of them is looked at
    if key is None:
        values = _drawn_seeded_op(shape, mixing.number)
    else:
        values = _drawn_keyed_op(shape, *_arguments(key), mixing.number)
    return dict(zip(mixing.names, values.unbind(), strict=True))


def _arguments(key: Key) -> tuple[int, int, torch.Tensor]:
    """A key as the operations take it: the seed's 64 bits with a sign, the index as a tensor."""
    seed, epoch, index = key
    if not isinstance(index, torch.Tensor):
        index = torch.tensor([index] if isinstance(index, int) else list(index))
    return ((int(seed) + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63), epoch, index


# ---------------------------------------------------------------------------------------------------- operations


def _seeded(images: torch.Tensor, number: int) -> torch.Tensor:
    return _finished(_NUMBERED[number], images, None, None)


def _keyed(images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, number: int) -> torch.Tensor:
    return _finished(_NUMBERED[number], images, (seed, epoch, index), None)


def _replayed(images: torch.Tensor, names: Sequence[str], values: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    pipeline = _NUMBERED[number]
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
    pipeline, dtype = _NUMBERED[rest[-1]], images.dtype
    for leaf in pipeline.leaves():
        dtype = leaf.output_dtype(dtype)
    size = pipeline.output_size((images.shape[2], images.shape[3]))
    return torch.empty((*images.shape[:2], *size), dtype=dtype, device=images.device, memory_format=_layout(images))


def _layout(images: torch.Tensor) -> torch.memory_format:
    interleaved = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if interleaved else torch.contiguous_format


def _drawn_seeded(images: torch.Tensor, number: int) -> torch.Tensor:
    return _drawn(_NUMBERED[number], images, None)


def _drawn_keyed(images: torch.Tensor, seed: int, epoch: int, index: torch.Tensor, number: int) -> torch.Tensor:
    return _drawn(_NUMBERED[number], images, (seed, epoch, index))


def _drawn(mixing: Mixing, images: torch.Tensor, key: Key | None) -> torch.Tensor:
    (draw,) = mixing.make_params(images, key=key).draws
    return torch.from_numpy(np.stack([draw[name] for name in mixing.names])).to(images.device)


def _fake_draws(images: torch.Tensor, *rest: Any) -> torch.Tensor:
    return images.new_empty((len(_NUMBERED[rest[-1]].names), len(images)), dtype=torch.float64)


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
_drawn_seeded_op = registration.register(
    "augment_draws_seeded(Tensor images, int number) -> Tensor",
    reference=_drawn_seeded,
    fallback=None,
    fake=_fake_draws,
    tags=(torch.Tag.nondeterministic_seeded,),
)
_drawn_keyed_op = registration.register(
    "augment_draws_keyed(Tensor images, SymInt seed, SymInt epoch, Tensor index, int number) -> Tensor",
    reference=_drawn_keyed,
    fallback=None,
    fake=_fake_draws,
)
