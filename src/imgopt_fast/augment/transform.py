"""What every augmentation is: numbers drawn per sample, named parameters made of them, and work recorded for them.

A call has two halves. `make_params` draws on the CPU in float64, from the sample's key alone; `transform` carries the
parameters out, and may be called again with the same ones: on other images (a teacher's larger crop), on masks, boxes
and keypoints, or inside `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index as index_of
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from imgopt_fast.augment import geometry, opaque, philox
from imgopt_fast.augment.fold import Fold, Sampling
from imgopt_fast.augment.geometry import Matrix, Size

Draw = dict[str, NDArray[Any]]
Key = tuple[int, int, Any]
Images = TypeVar("Images", torch.Tensor, NDArray[Any])


@dataclass(frozen=True)
class Params:
    """The drawn parameters of a batch: one dictionary per transform, of arrays with one entry per sample."""

    names: tuple[str, ...]
    draws: tuple[Draw, ...]
    count: int
    size: Size  # (H, W) of the images they were drawn for
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what the codes of a parameter stand for

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> list[tuple[str, dict[str, Any]]]:
        """(transform, {parameter: value}) for sample `i`; transforms that draw nothing are left out."""
        if not -self.count <= i < self.count:
            raise IndexError(f"sample {i} of {self.count}")
        return [
            (name, {k: self._decoded(k, v[i].tolist()) for k, v in draw.items()})
            for name, draw in zip(self.names, self.draws, strict=True)
            if draw
        ]

    def _decoded(self, name: str, value: Any) -> Any:
        if name not in self.labels:
            return value
        return [self.labels[name][v] for v in value] if isinstance(value, list) else self.labels[name][value]

    def describe(self, i: int) -> str:
        """One line for sample `i`, such as `RandomAffine(angle=12.1, translate=(3, -1))`."""
        parts = (
            f"{name}({', '.join(f'{k}={_shown(v)}' for k, v in values.items())})" for name, values in self.sample(i)
        )
        return "  ".join(parts)

    def __str__(self) -> str:
        return "\n".join(f"{i}: {self.describe(i)}" for i in range(self.count))


class _Plan(NamedTuple):
    """What all calls of a pipeline share."""

    blocks: philox.Words  # of all leaves
    starts: tuple[int, ...]  # where each leaf's numbers start among those of the blocks
    names: tuple[str, ...]
    labels: dict[str, tuple[str, ...]]


class Transform(opaque.Numbered):
    """Base of the augmentations. A subclass sets `words` and defines `draw` and `record`.

    Called on images: uint8 or floating tensors (N, C, H, W) or (C, H, W), contiguous or channels_last, on any device;
    or NumPy arrays (N, H, W, C), (H, W, C) or (H, W). Floating images hold values in [0, 1]. The result has the
    input's kind, dtype, device and layout, unless the transform says otherwise. Every sample gets its own draw::

        aug(images)                              from torch's global generator (torch.manual_seed)
        aug(images, generator=g)                 from a torch.Generator
        aug(images, key=(seed, epoch, index))    from the key alone: `index`, one integer per sample (a tensor, an
                                                 array, a sequence; an integer for a single image), names the samples

    With a key, a sample's draw does not depend on the batch that it comes in, the worker or the device.

    Raises:
        TypeError, ValueError: an argument of a constructor, or `images`, `generator`, `key`, `params` of a call, has a
            wrong type, shape or value; the text names it. torchvision's arguments have torchvision's meaning, unless
            the transform says otherwise.
    """

    words = 0  # uniform numbers that one sample takes
    labels: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # names for parameters that are codes
    decides = False  # whether `record` looks at the values of a draw, which no compiled graph can

    def draw(self, u: NDArray[np.float64], size: Size) -> Draw:
        """Parameters from numbers `u` in [0, 1), (at least `words`, N), for images of `size`."""
        return {}

    def record(self, fold: Fold, draw: Draw) -> None:
        """Ask `fold` for the work that the parameters describe."""
        raise NotImplementedError

    def matrix(self, draw: Draw, size: Size) -> Matrix | None:
        """The coordinate map (N or 1, 2 or 3, 3) that the parameters describe; None where nothing moves."""
        return None

    def output_size(self, size: Size) -> Size:
        """(H, W) of the output for input of `size`."""
        return size

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the output for images of `dtype`."""
        return dtype

    def leaves(self) -> tuple[Transform, ...]:
        return (self,)

    # ------------------------------------------------------------------------------------------ the call

    def forward(self, images: Images, *, generator: torch.Generator | None = None, key: Key | None = None) -> Images:
        batch, restore = as_batch(images)
        if torch.compiler.is_compiling():
            return restore(opaque.call(self, batch, generator, key))  # type: ignore[no-any-return]
        params = self._make_params(len(batch), (batch.shape[2], batch.shape[3]), generator, key)
        return restore(self._transform(batch, params))  # type: ignore[no-any-return]

    def make_params(
        self, images: torch.Tensor | NDArray[Any], *, generator: torch.Generator | None = None, key: Key | None = None
    ) -> Params:
        """Draw the parameters for `images` (only their shape is looked at)."""
        batch, _ = as_batch(images)
        return self._make_params(len(batch), (batch.shape[2], batch.shape[3]), generator, key)

    def transform(self, images: Images, params: Params) -> Images:
        """Carry out `params`: with those of `make_params`, the same as calling the transform."""
        batch, restore = as_batch(images)
        if len(batch) != params.count:
            raise ValueError(f"params: expected parameters of {len(batch)} samples, got {params.count}")
        return restore(self._transform(batch, params))  # type: ignore[no-any-return]

    def _make_params(self, count: int, size: Size, generator: torch.Generator | None, key: Key | None) -> Params:
        if torch.compiler.is_compiling():  # a compiled graph cannot hold the generator's 64-bit products
            return _drawn_outside(self, count, size, generator, key)  # type: ignore[no-any-return]
        return self._drawn(count, size, generator, key)

    def _drawn(self, count: int, size: Size, generator: torch.Generator | None, key: Key | None) -> Params:
        plan = self._plan
        seed, epoch, index = resolve_key(count, generator, key)
        u = philox.uniforms(seed, epoch, index, plan.blocks) if plan.blocks.size else np.empty((0, count))
        draws, current = [], size
        for leaf, start in zip(self.leaves(), plan.starts, strict=True):
            draws.append(leaf.draw(u[start : start + leaf.words], current))
            current = leaf.output_size(current)
        return Params(plan.names, tuple(draws), count, size, plan.labels)

    def _transform(self, batch: torch.Tensor, params: Params) -> torch.Tensor:
        if torch.compiler.is_compiling() and any(leaf.decides for leaf in self.leaves()):
            return opaque.replay(self, batch, params.draws)
        return self.carry_out(batch, params.draws)

    def carry_out(self, batch: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
        """The work that `draws`, one for each of the leaves, describe, on images (N, C, H, W)."""
        fold = Fold(batch)
        for leaf, draw in zip(self.leaves(), draws, strict=True):
            leaf.record(fold, draw)
        return fold.images()

    @cached_property
    def _plan(self) -> _Plan:
        leaves = self.leaves()
        blocks: list[int] = []
        starts = []
        for position, leaf in enumerate(leaves):
            starts.append(len(blocks) * philox.WORDS_PER_BLOCK)
            blocks += philox.blocks_of(position, leaf.words)
        labels = {name: values for leaf in leaves for name, values in leaf.labels.items()}
        names = tuple(type(leaf).__name__ for leaf in leaves)
        return _Plan(np.array(blocks, np.uint64), tuple(starts), names, labels)

    # ------------------------------------------------------------------------------------------ annotations

    def geometry(self, params: Params) -> tuple[Matrix, Size]:
        """The coordinate map of the whole pipeline, (N or 1, 2 or 3, 3), and the (H, W) of its output."""
        matrix, size = np.eye(3)[None, :2], params.size
        for leaf, draw in zip(self.leaves(), params.draws, strict=True):
            step = leaf.matrix(draw, size)
            if step is not None:
                matrix, size = geometry.compose(matrix, step), leaf.output_size(size)
        return matrix, size

    def transform_keypoints(self, points: torch.Tensor, params: Params) -> torch.Tensor:
        """Points (N, K, 2) of the images, (x, y) with pixel centres at integers, moved along: float64."""
        return geometry.transform_points(points, self.geometry(params)[0])

    def transform_boxes(self, boxes: torch.Tensor, params: Params, *, clip: bool = True) -> torch.Tensor:
        """Boxes (N, K, 4) of the images, (x1, y1, x2, y2) along pixel edges, moved along: float64.

        The result is the upright box around each moved box, clipped to the output unless `clip` is false.
        """
        matrix, size = self.geometry(params)
        return geometry.transform_boxes(boxes, matrix, size if clip else None)

    def transform_masks(self, masks: torch.Tensor, params: Params, *, fill: float = 0.0) -> torch.Tensor:
        """Masks (N, H, W) or (N, K, H, W) of any dtype, moved along with nearest sampling; `fill` outside."""
        if masks.dim() not in (3, 4) or len(masks) != params.count:
            raise ValueError(f"masks: expected ({params.count}, H, W) or ({params.count}, K, H, W), got {masks.shape}")
        planes = masks[:, None] if masks.dim() == 3 else masks
        exact = {torch.bool: torch.uint8, torch.int8: torch.float32, torch.int16: torch.float32}
        carried = masks.dtype if masks.dtype in _WARPED else exact.get(masks.dtype, torch.float64)
        fold = Fold(planes.to(carried))
        for leaf, draw in zip(self.leaves(), params.draws, strict=True):
            step = leaf.matrix(draw, fold.size)
            if step is not None:
                mode = getattr(leaf, "sampling", Sampling()).padding_mode
                fold.warp(step, leaf.output_size(fold.size), Sampling("nearest", mode, fill))
        moved = fold.images().to(masks.dtype)
        return moved[:, 0] if masks.dim() == 3 else moved


class Geometric(Transform):
    """A transform that moves pixels: a subclass defines `matrix`."""

    sampling = Sampling()
    flips = False  # whether the map does no more than to mirror the image

    def record(self, fold: Fold, draw: Draw) -> None:
        matrix = self.matrix(draw, fold.size)
        if matrix is not None:
            fold.warp(matrix, self.output_size(fold.size), self.sampling, flips=self.flips)


class Compose(Transform):
    """One transform after another, folded into as few passes over memory as possible (see imgopt_fast.augment.fold).

    Nested pipelines are flattened; the draws of a transform are keyed by its position in the flat list.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        super().__init__()
        for i, transform in enumerate(transforms):
            if not isinstance(transform, Transform):
                raise TypeError(
                    f"transforms: expected transforms of imgopt_fast.augment, got {type(transform)} at position {i}"
                )
        self.transforms = torch.nn.ModuleList(transforms)
        self._leaves = tuple(leaf for transform in transforms for leaf in transform.leaves())

    def leaves(self) -> tuple[Transform, ...]:
        return self._leaves

    def output_size(self, size: Size) -> Size:
        for leaf in self._leaves:
            size = leaf.output_size(size)
        return size


# ---------------------------------------------------------------------------------------------------- keys and layouts

_drawn_outside: Any = torch.compiler.disable(
    Transform._drawn,
    reason="make_params returns arrays, which no graph holds: call it outside of the compiled function and replay its "
    "result there with transform, or call the transform itself, whose draws are an operation of the graph",
)

_WARPED = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve_key(
    count: int, generator: torch.Generator | None, key: Key | None
) -> tuple[int, int, NDArray[np.integer[Any]]]:
    """(seed, epoch, indices of `count` samples); without a key, a seed from the generator and indices 0, 1, 2, ..."""
    if key is None:
        if not isinstance(generator, (torch.Generator, NoneType)):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        seed = int(torch.randint(0, 1 << 62, (1,), generator=generator).item())
        return seed, 0, np.arange(count)
    if generator is not None:
        raise ValueError("generator, key: expected at most one of the two")
    try:
        seed, epoch, index = key
    except (TypeError, ValueError):
        raise ValueError(f"key: expected (seed, epoch, index), got {key!r}") from None
    indices = np.atleast_1d(index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index))
    if indices.size == 0:
        indices = indices.astype(np.int64)  # of an empty list NumPy makes floats
    if indices.shape != (count,) or indices.dtype.kind not in "iu":
        raise ValueError(
            f"key: expected an index of {count} integers, one per sample, got shape {indices.shape} of {indices.dtype}"
        )
    try:
        return index_of(seed), index_of(epoch), indices
    except TypeError:
        raise ValueError(f"key: expected integers for seed and epoch, got {seed!r} and {epoch!r}") from None


def as_batch(images: torch.Tensor | NDArray[Any]) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """The images as (N, C, H, W), and what gives a result the form of the input back."""
    if isinstance(images, torch.Tensor):
        if images.dtype not in _WARPED:
            raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
        if images.dim() == 4:
            return images, _same
        if images.dim() == 3:
            return images[None], _first
        raise ValueError(f"images: expected (N, C, H, W) or (C, H, W), got {tuple(images.shape)}")
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images: expected a tensor or a NumPy array, got {type(images).__name__}")
    if images.ndim not in (2, 3, 4):
        raise ValueError(f"images: expected (N, H, W, C), (H, W, C) or (H, W), got {images.shape}")
    readable = images.flags.writeable and all(stride >= 0 for stride in images.strides)
    tensor = torch.from_numpy(images if readable else images.copy())
    if tensor.dtype not in _WARPED:
        raise TypeError(f"images: expected uint8 or a floating dtype, got {images.dtype}")
    if images.ndim == 2:
        return tensor[None, None], lambda result: result[0, 0].numpy()
    if images.ndim == 3:
        return tensor[None].permute(0, 3, 1, 2), lambda result: result[0].permute(1, 2, 0).numpy()
    return tensor.permute(0, 3, 1, 2), lambda result: result.permute(0, 2, 3, 1).numpy()


def _same(result: torch.Tensor) -> torch.Tensor:
    return result


def _first(result: torch.Tensor) -> torch.Tensor:
    return result[0]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value else "0"  # never -0
    if isinstance(value, list):
        return f"({', '.join(_shown(v) for v in value)})"
    return str(value)
