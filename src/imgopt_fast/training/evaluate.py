"""What a trained network is worth: accuracy on a split, latency and throughput, density."""

import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imgopt_fast.augment import Compose
from imgopt_fast.data import Split
from imgopt_fast.training.distributed import Process

ALONE = Process()
BATCH = 128  # images per call where throughput matters
GPU_BATCH = 1024  # images per call of a GPU, whose launches cost more than the work on fewer
LEAST_SECONDS = 0.5  # per measurement: some hundred calls at batch 1, enough for a steady median


class Speed(NamedTuple):
    """Median seconds for one image, and images per second in batches of BATCH."""

    latency: float
    images_per_second: float


@torch.no_grad()
def predictions(model: nn.Module, split: Split, prepare: Compose, *, batch_size: int | None = None) -> Tensor:
    """(N,) the class that the model finds in each image; the model is left in evaluation mode."""
    model.eval()
    batch_size = batch_size or (GPU_BATCH if split.labels.is_cuda else BATCH)
    return torch.cat([model(prepare(batch.images)).argmax(dim=1) for batch in split.in_order(batch_size)])


def accuracy(
    model: nn.Module, split: Split, prepare: Compose, *, batch_size: int | None = None, process: Process = ALONE
) -> float:
    """Share of `split` whose class the model finds, each process looking at its part; left in evaluation mode."""
    part = split if process.world == 1 else split.take(torch.arange(process.rank, len(split), process.world))
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    if len(part):
        right += (predictions(model, part, prepare, batch_size=batch_size) == part.labels).sum()
    process.sum([right])
    return int(right) / len(split)


@torch.no_grad()
def measure_speed(model: nn.Module, images: Tensor) -> Speed:
    """Times the model on prepared (float, normalized) `images`; equal work in every call."""
    model.eval()
    batch = images[:BATCH].contiguous(memory_format=torch.channels_last)
    return Speed(_median_seconds(model, batch[:1]), len(batch) / _median_seconds(model, batch))


def density(model: nn.Module) -> float:
    """Share of the weights of convolutions and linear layers that are not zero."""
    names = ("weight", "weight_int8")
    weights = [tensor for name, tensor in model.state_dict().items() if name.endswith(names) and tensor.ndim in (2, 4)]
    if not weights:
        return 0.0
    present = torch.stack([w.count_nonzero() for w in weights]).sum()  # a GPU is waited for once
    return float(present / sum(w.numel() for w in weights))


def _median_seconds(model: nn.Module, images: Tensor) -> float:
    for _ in range(3):
        model(images)  # packing and one-time choices of the libraries below
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < LEAST_SECONDS:
        begin = time.perf_counter()
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()  # the call returns before the work is done
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
