"""A whole pipeline as one operation of a compiled graph.

No graph can hold the draws, whose generator multiplies to 64 bits, nor the transforms that decide by the values drawn
what there is to do (which samples of a policy are sharpened, which rectangle is overwritten). Inside `torch.compile` a
call of a pipeline, a replay with such a transform, and the draws of MixUp and CutMix run as they do outside, behind
operations that the compiler does not look into, so that the graph around them stays whole. A call is a function of its
key, which is an input of its operation: so the gradient is an operation too, which runs the pipeline again and
differentiates it. Without a key, one more operation takes a seed from torch's generator, or from the caller's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
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
_GENERATORS: dict[int, torch.Generator] = {}  # by id; those that a graph draws from, kept as long as it may run


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


def call(pipeline: Transform, images: torch.Tensor, generator: torch.Generator | None, key: Key | None) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters of `key`, or of a generator, in one operation."""
    return _call_op(images, *_keyed(len(images), generator, key), pipeline.number)  # type: ignore[no-any-return]


def replay(pipeline: Transform, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """`pipeline` on a batch of images with the parameters `draws` of its transforms, in one operation."""
    names = [f"{i}:{name}" for i, draw in enumerate(draws) for name in draw]
    values = [torch.from_numpy(value) for draw in draws for value in draw.values()]
    return _replay_op(images, names, values, pipeline.number)  # type: ignore[no-any-return]


def draws(
    mixing: Mixing, images: torch.Tensor, generator: torch.Generator | None, key: Key | None
) -> dict[str, torch.Tensor]:
    """What `mixing` draws for a batch of images by `key`, or by a generator, in one operation: (N,) float64."""
    shape = images.detach()  # nothing else of them is looked at
    values = _draws_op(shape, *_keyed(len(images), generator, key), mixing.number)
    return dict(zip(mixing.names, values.unbind(), strict=True))


def _keyed(count: int, generator: torch.Generator | None, key: Key | None) -> tuple[torch.Tensor, int, torch.Tensor]:
    """A key as the operations take it: the seed's 64 bits with a sign, () int64, the epoch, and the index (N,)."""
    if key is None:
        index = torch.arange(count)
        return _seed_op(index, None if generator is None else _number_of(generator)), 0, index
    if generator is not None:
        raise ValueError("generator, key: expected at most one of the two")
    seed, epoch, index = key
    if not isinstance(index, torch.Tensor):
        index = torch.tensor([index] if isinstance(index, int) else list(index))
    signed = ((int(seed) + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
    return torch.full((), signed, dtype=torch.int64), epoch, index


def _number_of(generator: torch.Generator) -> int:
    _keep(generator)
    return id(generator)  # the compiler guards it: another generator, another graph


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _keep(generator: torch.Generator) -> None:
    """Runs while the graph is made, which cannot take a generator as an input."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    _GENERATORS[id(generator)] = generator


# ---------------------------------------------------------------------------------------------------- operations


def _seed(index: torch.Tensor, generator: int | None) -> torch.Tensor:
    return torch.randint(0, 1 << 62, (1,), generator=None if generator is None else _GENERATORS[generator])[0]


def _called(images: torch.Tensor, seed: torch.Tensor, epoch: int, index: torch.Tensor, number: int) -> torch.Tensor:
    pipeline = _NUMBERED[number]
    return _finished(pipeline, images, pipeline.make_params(images, key=(int(seed), epoch, index)).draws)


def _replayed(images: torch.Tensor, names: Sequence[str], values: Sequence[torch.Tensor], number: int) -> torch.Tensor:
    pipeline = _NUMBERED[number]
    draws: list[Draw] = [{} for _ in pipeline.leaves()]
    for name, value in zip(names, values, strict=True):
        place, _, parameter = name.partition(":")
        draws[int(place)][parameter] = value.cpu().numpy()
    return _finished(pipeline, images, draws)


def _finished(pipeline: Transform, images: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """The result, in new memory (an operation neither writes to its input nor returns it) and the layout of `_fake`."""
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


def _drawn(images: torch.Tensor, seed: torch.Tensor, epoch: int, index: torch.Tensor, number: int) -> torch.Tensor:
    mixing = _NUMBERED[number]
    (draw,) = mixing.make_params(images, key=(int(seed), epoch, index)).draws
    return torch.from_numpy(np.stack([draw[name] for name in mixing.names])).to(images.device)


def _fake_draws(images: torch.Tensor, *rest: Any) -> torch.Tensor:
    return images.new_empty((len(_NUMBERED[rest[-1]].names), len(images)), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- registration


def _differentiable(name: str, arguments: str, forward: Callable[..., torch.Tensor]) -> torch._ops.OpOverload:
    """The operation `forward` of images and `arguments`, and beside it that of its gradient, which runs it again."""

    def gradient(grad: torch.Tensor, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            result = forward(leaf, *rest)
        return torch.autograd.grad(result, leaf, grad)[0].contiguous(memory_format=_layout(images))

    def fake_gradient(grad: torch.Tensor, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.empty_like(images, memory_format=_layout(images))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        images, *ctx.rest = inputs
        ctx.save_for_backward(images)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return (backward_op(grad, *ctx.saved_tensors, *ctx.rest), *[None] * len(ctx.rest))

    op = registration.register(
        f"{name}(Tensor images, {arguments}) -> Tensor", reference=forward, fallback=None, fake=_fake
    )
    backward_op = registration.register(
        f"{name}_backward(Tensor grad, Tensor images, {arguments}) -> Tensor",
        reference=gradient,
        fallback=None,
        fake=fake_gradient,
    )
    registration.register_autograd(op, backward, setup_context)
    return op


_seed_op = registration.register(
    "augment_seed(Tensor index, int? generator) -> Tensor",
    reference=_seed,
    fallback=None,
    fake=lambda index, generator: torch.empty((), dtype=torch.int64),
    tags=(torch.Tag.nondeterministic_seeded,),  # so that the compiler neither merges two calls nor drops one
)
_KEY = "Tensor seed, SymInt epoch, Tensor index, int number"
_call_op = _differentiable("augment_keyed", _KEY, _called)
_replay_op = _differentiable("augment", "str[] names, Tensor[] values, int number", _replayed)
_draws_op = registration.register(
    f"augment_draws(Tensor images, {_KEY}) -> Tensor", reference=_drawn, fallback=None, fake=_fake_draws
)
