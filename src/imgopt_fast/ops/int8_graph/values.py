"""What a builder of int8_graph knows of a value, from its channels to the windows that its size went through."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from imgopt_fast import _arguments as arguments
from imgopt_fast.ops.int8_graph.plan import DTYPES


class ValueInfo(NamedTuple):
    """What `Int8GraphBuilder.value` says; `channels` is None where they are known only when the program runs."""

    rank: int
    channels: int | None
    dtype: torch.dtype
    scale: float
    zero_point: int


@dataclass
class Value:
    """What the builder itself keeps of a value."""

    rank: int
    channels: int | None
    dtype: torch.dtype
    scale: float
    zero_point: int
    source: int  # the input whose batch and size it follows
    windows: tuple[int, ...] = ()  # as in `output_shapes`
    flattened: int = 0  # channels of the image that it was, where its own are known only when it runs
    place: int = -1  # its number in the plan, which it shares with what `reread` makes of it

    def windowed(self, window: list[int]) -> "Value":
        """A value of the same quantization, its size mapped by the window."""
        kernel_h, kernel_w, stride_h, stride_w, top, bottom, left, right = window
        windows = (kernel_h, stride_h, top + bottom, kernel_w, stride_w, left + right)
        return replace(self, rank=4, windows=self.windows + windows, flattened=0, place=-1)

    def signature(self) -> tuple[int, ...]:
        """As in `Int8Program.inputs`."""
        return (self.rank, self.channels or 0, DTYPES.index(self.dtype))

    def recipe(self) -> tuple[int, ...]:
        """How to get its shape from the inputs', as `output_shapes` reads it."""
        channels = self.flattened if self.channels is None else self.channels
        return (
            self.rank,
            channels,
            DTYPES.index(self.dtype),
            self.source,
            int(self.channels is None),
            len(self.windows) // 6,
            *self.windows,
        )


def window_of(kernel: Sequence[int], stride: list[int], sides: list[int]) -> list[int]:
    return [*kernel, *stride, *sides]


def pool_window(
    kernel_size: int | Sequence[int], stride: int | Sequence[int] | None, padding: arguments.Padding
) -> list[int]:
    kernel = arguments.as_pair("kernel_size", kernel_size, 1)
    strides = kernel if stride is None else arguments.as_pair("stride", stride, 1)
    sides = arguments.as_sides(padding)
    if max(sides[:2]) >= kernel[0] or max(sides[2:]) >= kernel[1]:
        raise ValueError(f"padding: expected less than kernel_size={kernel}, got {padding}")
    return window_of(kernel, strides, sides)


def check_rank(rank: int) -> None:
    if rank not in (2, 4):
        raise ValueError(f"rank: expected 2 or 4, got {rank}")


def check_channels(channels: int) -> None:
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")


def clamp_shift(right: int) -> int:
    return min(max(right, -31), 62)
