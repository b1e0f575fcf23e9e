"""The batch size and the learning rates of a training that does not name them.

Few images want small batches: an epoch of three updates learns nothing. Large images in a large network want them, too,
since what the backward pass needs of every layer stays in memory until it comes; that is counted in one forward pass.
A batch of 128 is where the throughput of two cores has levelled off, one of 512 where that of a GPU has (ResNet-20 on
an H100: 101,500 images/s, 109,200 at 1024 with a point less accuracy after 12 epochs).
"""

import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from imgopt_fast.augment import Compose
from imgopt_fast.data import Dataset
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.distributed import Process

MOST, LEAST = 128, 8
GPU_MOST = 512
UPDATES = 32  # of an epoch, at least
MEMORY = 0.5  # share of what is free that the activations and their gradients may take
RATE, ADAM_RATE = 0.2, 0.002  # for a batch of MOST
PRUNE_RATE, QAT_RATE = 0.5, 0.025  # of --lr
CGROUP = Path("/sys/fs/cgroup")  # of version 2, where a container's limits are


def with_batch_size(
    config: TrainConfig, dataset: Dataset, model: nn.Module, prepare: Compose, process: Process
) -> TrainConfig:
    """`config` with the batch size and the rates that it leaves open, the same in all processes."""
    size = config.batch_size
    if not size:
        size = GPU_MOST if dataset.validation.labels.is_cuda else MOST
        while size > LEAST and size * UPDATES > len(dataset.train):
            size //= 2
        fits = min(process.gather(_images_in_memory(config, dataset, model, prepare)))  # of a process' part
        while size > LEAST and size > fits * process.world:
            size //= 2
    lr = config.lr
    if not lr:
        share = 1.0 if config.opt == "gd" else size * config.grad_accum_steps / MOST
        lr = ADAM_RATE * share**0.5 if config.opt in ("adam", "adamw") else RATE * share
    prune_lr, qat_lr = config.prune_lr or lr * PRUNE_RATE, config.qat_lr or lr * QAT_RATE
    return dataclasses.replace(config, batch_size=size, lr=lr, prune_lr=prune_lr, qat_lr=qat_lr)


def _images_in_memory(config: TrainConfig, dataset: Dataset, model: nn.Module, prepare: Compose) -> float:
    images = prepare(dataset.validation.take(torch.zeros(4, dtype=torch.int64)).images)
    free, precision = free_bytes(images.device), config.amp_type() if config.uses_amp() else None
    some, more = (saved_bytes(model, part, precision) for part in (images[:2], images))
    saved = max(1.0, (more - some) / 2)  # the difference leaves out what is kept once, such as weights in bfloat16
    return float("inf") if free is None else free * MEMORY / (2 * saved)  # each comes with a gradient of its size


def saved_bytes(model: nn.Module, images: Tensor, precision: torch.dtype | None) -> int:
    """Bytes that a training pass of `model` over `images` keeps for the backward pass, weights not counted.

    `precision`: of autocast, None for none. The model stays as it is.
    """
    copied, kept = copy.deepcopy(model).train(), dict[int, int]()
    weights = {t.untyped_storage().data_ptr() for t in (*copied.parameters(), *copied.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    devices = [images.device] if images.is_cuda else []
    with (
        torch.random.fork_rng(devices),
        torch.enable_grad(),
        torch.autocast(images.device.type, precision, enabled=precision is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = copied(images)  # holds on to what was saved, so that no address is counted twice
    del output
    return sum(kept.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that a program can still take on `device`; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):  # no Linux, or no limit
        pass
    return max(0, min(found)) if found else None
