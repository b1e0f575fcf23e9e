"""What one batch does to the weights: loss, gradients, update. On a GPU it is recorded once and replayed.

A step of ResNet-20 is some 600 launches, which take the processor longer than a GPU needs for the work: recorded as a
CUDA graph, the step is one launch (batches of 512 on an H100: 101,500 images/s and the GPU busy for 90 % of the time,
32,000 and 26 % without). The first steps run eagerly, as steps of the training like any other: libraries choose their
algorithms meanwhile, and the last of them shows whether anything waits for the GPU, which no graph can hold. A training
whose step cannot be recorded goes on eagerly.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from imgopt_fast.training.clock import RECORDED
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.optimizers import Updates
from imgopt_fast.training.sampled_gradients import SampledGradients
from imgopt_fast.training.teachers import Objective

EAGER_STEPS = 3  # before the recording

Lap = Callable[[str], None]  # takes a phase of the clock, see imgopt_fast.training.clock

logger = logging.getLogger("imgopt_fast")


class Learner(Protocol):
    """Learns from a batch: its `images`, their `targets`, what a teacher says of them.

    `share` is the batch's of an update, `of_epoch` that of an epoch, as shares of the images. Returns whether the
    weights are updated already; otherwise the gradients have grown.
    """

    def __call__(
        self, images: Tensor, targets: Tensor, taught: Tensor | None, *, share: float, of_epoch: float, lap: Lap
    ) -> bool: ...


class EagerStep:
    """Forward and backward. `loss_sum` grows by the batch's part of the mean loss of the epoch."""

    def __init__(
        self, network: Callable[[Tensor], Tensor], objective: Objective, updates: Updates, amp: bool, loss_sum: Tensor
    ) -> None:
        self.network, self.objective, self.updates, self.amp, self.loss_sum = network, objective, updates, amp, loss_sum

    def __call__(
        self, images: Tensor, targets: Tensor, taught: Tensor | None, *, share: float, of_epoch: float, lap: Lap
    ) -> bool:
        config = self.objective.config
        sampled = SampledGradients(config.grad_sampling) if config.grad_sampling > 1 else nullcontext()
        with torch.autocast(images.device.type, config.amp_type(), enabled=self.amp), sampled:
            loss = self.objective(self.network, images, targets, taught)
        lap("forward")
        self.updates.backward(loss, share)
        self.loss_sum += loss.detach() * of_epoch
        lap("backward")
        return False


class RecordedStep:
    """An EagerStep with the update behind it, replayed from memory of its own. Batches of another shape run eagerly."""

    def __init__(self, step: EagerStep) -> None:
        self.step, self.updates = step, step.updates
        self.eager_left = EAGER_STEPS
        self.replay: Callable[[], None] | None = None
        self.inputs: list[Tensor] = []
        self.rates: list[Tensor] = []  # of the optimizer's groups, where the recording reads them
        model = self.updates.model
        self.changed = [*model.parameters(), *(b for b in model.buffers())]

    def __call__(
        self, images: Tensor, targets: Tensor, taught: Tensor | None, *, share: float, of_epoch: float, lap: Lap
    ) -> bool:
        def learn(images: Tensor, targets: Tensor, taught: Tensor | None = None, lap: Lap = _untimed) -> None:
            self.step(images, targets, taught, share=share, of_epoch=of_epoch, lap=lap)
            self.updates.apply()
            lap("step")

        batch = [images, targets, *([] if taught is None else [taught])]
        if self.eager_left > 0:
            self.eager_left -= 1
            with _waits_noticed(looking=self.eager_left == 0) as waits:
                learn(images, targets, taught, lap)
            if self.eager_left == 0 and not waits:
                self._record(learn, batch)
            elif waits:
                logger.info(f"the training step is not recorded as a CUDA graph: {waits[0]}")
        elif self.replay is None or not all(_alike(a, b) for a, b in zip(batch, self.inputs, strict=True)):
            learn(images, targets, taught, lap)
        else:
            for static, given in zip(self.inputs, batch, strict=True):
                static.copy_(given)
            for rate, group in zip(self.rates, self.updates.optimizer.param_groups, strict=True):
                rate.fill_(group["lr"])
            self.replay()
            torch.autograd.graph.increment_version(self.changed)  # for what is prepared once for a version of a weight
            lap(RECORDED)
        return True

    def _record(self, learn: Callable[..., None], batch: list[Tensor]) -> None:
        groups = self.updates.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        self.inputs = [tensor.clone() for tensor in batch]
        self.rates = [torch.tensor(rate, dtype=torch.float32, device=batch[0].device) for rate in numbers]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            self.replay = record(lambda: learn(*self.inputs))
        except RuntimeError as error:
            logger.info(f"the training step is not recorded as a CUDA graph: {str(error).splitlines()[0]}")
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["lr"] = number
        self.updates.optimizer.zero_grad()


def record(function: Callable[[], None]) -> Callable[[], None]:
    """What repeats the work that `function` launches on the current stream; it does not run now."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: one that fetches batches allocates pinned memory.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        function()
    replay: Callable[[], None] = graph.replay
    return replay


def recordable(config: TrainConfig, updates: Updates, process: Process, per_update: int) -> bool:
    """Whether a step is the same launches every time, and the processor need not see any result of them.

    Masks that tighten and gradients summed over batches or processes are the processor's business.
    """
    varying = updates.pruner is not None or config.grad_sampling > 1 or config.kd_hint_weight > 0
    outside = updates.scaler.is_enabled() or config.l1 > 0 or per_update > 1 or process.world > 1
    on_gpu = next(updates.model.parameters()).is_cuda
    return config.cuda_graphs and on_gpu and not config.torchcompile and not (varying or outside)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Within, work is queued on a stream that a graph can record: the default one is not."""
    if device.type != "cuda":
        yield
        return
    before, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@contextmanager
def _waits_noticed(looking: bool) -> Iterator[list[str]]:
    """Gives a list that has a line, once the block has ended, for each time that the processor waited for the GPU."""
    found: list[str] = []
    if not looking or not torch.cuda.is_available():
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno} waits for its result")
        elif "Synchronization debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _untimed(phase: str) -> None:
    """No lap: inside a recording there is no time."""
