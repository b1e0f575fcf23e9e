"""Several processes that train one network: `torchrun --nproc-per-node N -m imgopt_fast train ...`.

`--batch-size` is that of all processes together. Each takes its part of every batch, in the order and with the
augmentation that a single process would have, and one sum per update carries the gradients, batch norm's statistics
and whether somebody wants to stop. gloo on CPUs, NCCL on GPUs. The first process alone writes files.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imgopt_fast.data import Share


@dataclass(frozen=True)
class Process:
    """This process among `world`; alone, nothing here does anything."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    def share(self, halo: int) -> Share | None:
        """What picks this process' part of a batch, behind the `halo` images that precede it there, in a circle.

        Mixing takes an image's partner from the place before, so that the first image of a part needs it, too.
        """
        if self.world == 1:
            return None

        def part(index: Tensor) -> Tensor:
            begin, end = (len(index) * rank // self.world for rank in (self.rank, self.rank + 1))
            return index[torch.arange(begin - halo, end) % len(index)]

        return part

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one message for each dtype."""
        if self.world == 1:
            return
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            members = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in members])
            dist.all_reduce(flat)
            for tensor, total in zip(members, flat.split([t.numel() for t in members]), strict=True):
                tensor.copy_(total.view(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in order."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes through the block before the others, which find in the cache what it built."""
        if not self.main:
            dist.barrier()
        try:
            yield
        finally:
            if self.main and self.world > 1:
                dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Process]:
    """This process as torchrun started it; alone where it did not."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Process()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_device(device))
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Process(dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


def local_device(device: str) -> str:
    """`device`, and of several GPUs this process' own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
