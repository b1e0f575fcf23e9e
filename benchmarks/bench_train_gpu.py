"""How busy a training keeps a GPU, and how soon it is near its final accuracy.

    python benchmarks/bench_train_gpu.py CIFAR                                 ResNet-20, batch 512, 12 epochs
    python benchmarks/bench_train_gpu.py CIFAR --model resnet18 -b 512 --eager

CIFAR is a zip or folder of CIFAR-10 as JPEG files (or IMGOPT_CIFAR). The training is the product's own loop, `fit`,
with all that it does between epochs: validation, summary, checkpoint. Two runs: one undisturbed, for images/s and the
time to 90 % of the final validation accuracy; one of a few epochs under torch's profiler, for the share of the time in
which at least one kernel or copy ran on the GPU: the union of their intervals, from the end of the first epoch (whose
start loads libraries) to that of the last. Beside it what NVML says, the share of its sampling periods in which
anything ran. `--eager` shows the same without the recorded step.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.data import Dataset, load_dataset
from imgopt_fast.models import create_model
from imgopt_fast.training import TrainConfig
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.evaluate import accuracy
from imgopt_fast.training.events import Events
from imgopt_fast.training.loop import Fitting, fit
from imgopt_fast.training.report import EpochRow
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import Stage

NEAR = 0.9  # of the final accuracy
PROFILED_EPOCHS = 4
LONG_GAP = 50e3  # ns without work on the GPU that one line of Python explains


class Marks(Events):
    """When each epoch, its validation included, was over: nanoseconds since 1970."""

    def __init__(self) -> None:
        super().__init__(None)
        self.ends: list[int] = []

    def write(self, row: EpochRow, seconds: dict[str, float]) -> None:
        self.ends.append(time.time_ns())


def trained(config: TrainConfig, data: Dataset) -> tuple[list[EpochRow], Marks, float, dict[str, float]]:
    """The epochs of a training, when they ended, the test accuracy, and the seconds of the phases."""
    mean, std = data.statistics()
    torch.manual_seed(config.seed)
    model: Any = create_model(config.model, num_classes=len(data.class_names), in_channels=data.channels)
    model = model.to(config.device, memory_format=torch.channels_last)
    placed, prepare, marks = data.to(torch.device(config.device)), Compose([Normalize(mean, std)]), Marks()
    augment = Augmentation(config, Normalize(mean, std), len(data.class_names))
    with tempfile.TemporaryDirectory() as folder:
        fitting = Fitting(config, placed, augment, prepare, RunFolder(Path(folder)), Process(), marks)
        marks.ends.append(time.time_ns())
        rows = fit(Stage("dense", 0, config.epochs, config.lr, config.warmup_epochs), model, fitting, [])
    return rows, marks, accuracy(model, placed.test, prepare), fitting.times["dense"]


def longest(events: list[Any], count: int) -> list[str]:
    """A line for each of the kernels that take most of the GPU's time."""
    totals: dict[str, list[float]] = {}
    for event in events:
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            totals.setdefault(event.name(), []).append(event.duration_ns() / 1e3)
    whole = sum(map(sum, totals.values()))
    ordered = sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:count]
    return [f"{sum(v) / whole:6.1%} {len(v):6d} of {statistics.median(v):6.1f} us  {name[:90]}" for name, v in ordered]


def busy(events: list[Any], begin: int, end: int) -> tuple[float, float]:
    """Share of the time from `begin` to `end` in which the GPU worked, and that of the gaps above LONG_GAP."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
    )
    work, gaps, reached = 0, 0, begin
    for start, stop in spans:
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            work += stop - start
            gaps += start - reached if start - reached > LONG_GAP else 0
            reached = stop
    return work / (end - begin), gaps / (end - begin)


@contextmanager
def nvml(found: list[float]) -> Iterator[None]:
    """Fills `found` with the utilization in percent, every 50 ms; with nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "50"]
    try:
        sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield
        return
    yield
    sampler.terminate()
    output, _ = sampler.communicate()
    found += [float(line) for line in output.split() if line.isdigit()]


def measured(config: TrainConfig, data: Dataset, kernels: int) -> None:
    samples: list[float] = []
    with nvml(samples):
        rows, marks, tested, phases = trained(config, data)
    final = rows[-1].eval_top1
    near = next(i for i, row in enumerate(rows) if row.eval_top1 >= NEAR * final)
    rate = statistics.median(row.images_per_second for row in rows[1:])
    seconds = [(end - begin) / 1e9 for begin, end in zip(marks.ends, marks.ends[1:], strict=False)]
    between = statistics.median(s - row.seconds for s, row in zip(seconds[1:], rows[1:], strict=True))
    name = f"{config.model}, batch {config.batch_size}, {'recorded' if config.cuda_graphs else 'eager'}"
    print(f"{name}: {rate:,.0f} images/s; first epoch {rows[0].seconds:.2f} s, then {rows[-1].seconds:.3f} s each, and "
          f"{between * 1e3:.0f} ms between them")  # fmt: skip
    print(f"  final accuracy: validation {final:.2%}, test {tested:.2%}; {NEAR:.0%} of it after epoch {near + 1}, "
          f"{(marks.ends[near + 1] - marks.ends[0]) / 1e9:.2f} s")  # fmt: skip
    print("  phases: " + ", ".join(f"{phase} {value:.2f} s" for phase, value in phases.items()))
    if samples:
        print(f"  NVML: {statistics.mean(samples[len(samples) // 4 :]):.0f} % of the last three quarters")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _, marks, _, _ = trained(dataclasses.replace(config, epochs=PROFILED_EPOCHS), data)
    kineto: Any = profiler.profiler
    events = kineto.kineto_results.events()
    share, gaps = busy(events, marks.ends[1], marks.ends[-1])
    slower = statistics.median(b - a for a, b in zip(marks.ends[1:], marks.ends[2:], strict=False)) / 1e9
    print(f"  GPU busy {share:.1%} of epochs 2 to {PROFILED_EPOCHS} under the profiler ({slower:.3f} s each with all "
          f"between); gaps above {LONG_GAP / 1e3:.0f} us take {gaps:.1%}", flush=True)  # fmt: skip
    print("\n".join(longest(events, kernels)), end="\n" * (kernels > 0), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("IMGOPT_CIFAR"))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("-b", "--batch-size", type=int, nargs="+", default=[512])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--eager", action="store_true", help="without the recorded step, too")
    parser.add_argument("--kernels", type=int, default=0, help="show so many of those that take most of the time")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error("expected a data set, as an argument or in IMGOPT_CIFAR")
    data = load_dataset(arguments.data)
    for batch_size in arguments.batch_size:
        for graphs in (True, False)[: 1 + arguments.eager]:
            config = TrainConfig(
                model=arguments.model, epochs=arguments.epochs, batch_size=batch_size, lr=0.2 * batch_size / 128,
                device=arguments.device, cuda_graphs=graphs,
            )  # fmt: skip
            measured(config, data, arguments.kernels)


if __name__ == "__main__":
    main()
