"""What a training tells: a table for the terminal, and the files summary.csv, curves.png and report.md."""

import csv
import dataclasses
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imgopt_fast import __version__, _native
from imgopt_fast.compress.quantize import QuantizationReport
from imgopt_fast.data import Dataset
from imgopt_fast.training import figures, memory
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.config import TrainConfig, cpu_features
from imgopt_fast.training.evaluate import Speed
from imgopt_fast.training.page import page
from imgopt_fast.training.run_folder import RunFolder
from imgopt_fast.training.stages import title


@dataclass(frozen=True)
class EpochRow:
    """A line of summary.csv. All but the last two columns are the same whenever the training is repeated."""

    epoch: int
    stage: str
    train_loss: float
    eval_top1: float  # share of the validation images, in [0, 1]
    lr: float
    density: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class StageRow:
    """A line of the table at the end: what one of the networks is worth."""

    stage: str
    test_top1: float  # share of the test images, in [0, 1]
    density: float  # share of the weights that are not zero
    file_bytes: int
    peak_bytes: int | None  # of inference, weights included; see imgopt_fast.training.memory
    speed: Speed


@dataclass(frozen=True)
class Report:
    config: TrainConfig
    dataset: Dataset
    path: Path  # of the run folder
    epochs: list[EpochRow]
    stages: list[StageRow]
    found: Tensor  # (N,) the class that the last network finds in each test image
    reference_seconds: float | None  # of one epoch in the plain PyTorch loop
    seconds: float  # of everything
    times: dict[str, dict[str, float]]  # seconds per stage and phase
    layers: QuantizationReport | None  # of the int8 network, if there is one

    def cells(self) -> list[tuple[str, ...]]:
        """The networks side by side: a line of titles, then one for each."""
        return [
            ("", "accuracy", "density", "size", "memory", "latency", "images/s"),
            *(
                (
                    title(row.stage, self.config),
                    f"{row.test_top1:.2%}",
                    f"{row.density:.0%}",
                    f"{row.file_bytes / 1024:,.0f} KiB",
                    "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f} MiB",
                    f"{row.speed.latency * 1e3:.2f} ms",
                    f"{row.speed.images_per_second:,.0f}",
                )
                for row in self.stages
            ),
        ]

    def table(self) -> str:
        """The networks side by side, and the epoch beside the plain loop's."""
        head, *rows = self.cells()
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in (head, *rows)
        ]
        return "\n".join(["  ".join(lines[:1]).rstrip(), "─" * len(lines[0]), *lines[1:], "", *self.epoch_lines()])

    def epoch_seconds(self, stage: str) -> float | None:
        """Median seconds of an epoch of `stage`, validation not counted."""
        seconds = [row.seconds for row in self.epochs if row.stage == stage]
        return statistics.median(seconds) if seconds else None

    def epoch_lines(self) -> list[str]:
        dense, pruned = self.epoch_seconds("dense"), self.epoch_seconds("pruned")
        lines = []
        if dense is not None:
            lines.append(f"One epoch of {len(self.dataset.train):,} images: {dense:.1f} s dense")
            if pruned is not None:
                lines[0] += f", {pruned:.1f} s while pruning"
            if self.reference_seconds is not None:
                ratio = self.reference_seconds / dense
                lines[0] += (
                    f"; {self.reference_seconds:.1f} s in a plain PyTorch loop ({ratio:.1f} times the dense one)"
                )
        return [*lines, f"Everything took {self.seconds:.0f} s; the run folder is {self.path}"]


def write_report(run: RunFolder, report: Report, augment: Augmentation) -> None:
    names = report.dataset.class_names
    run.write("samples.png", lambda path: figures.samples(path, report.dataset, augment, report.config.seed))
    run.write("summary.csv", lambda path: write_summary(path, report.epochs))
    run.write("curves.png", lambda path: figures.curves(path, report.epochs, report.config))
    run.write("confusion.png", lambda path: figures.confusion(path, report.dataset.test.labels, report.found, names))
    run.write("mistakes.png", lambda path: figures.mistakes(path, report.dataset.test, report.found, names))
    if (layers := report.layers) is not None:
        run.write("layers.png", lambda path: figures.layers(path, layers))
    run.write("report.md", lambda path: path.write_text(_markdown(report)))
    run.write("report.html", lambda path: path.write_text(page(report)))


def write_summary(path: Path, epochs: list[EpochRow]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(EpochRow)])
        # repr gives every digit, so that two runs can be compared bit for bit.
        writer.writerows([repr(v) if isinstance(v, float) else v for v in dataclasses.astuple(row)] for row in epochs)


def _markdown(report: Report) -> str:
    notes = "\n".join(f"- {line}" for line in [*note_lines(report), f"Seconds: {_times(report)}."])
    return f"""# {title_line(report)}

{data_line(report)}

```
{report.table()}
```

{notes}

![curves](curves.png)

A batch as the network saw it, with the parameters that were drawn:

![samples](samples.png)

How often the final network takes images of one class (row) for another (column), and images that it gets wrong:

![confusion](confusion.png)
![mistakes](mistakes.png)

{_layers(report)}{_unreadable(report)}Repeat it with `imgopt-fast train --config config.yaml --experiment NAME`. \
The final network is `model.safetensors`.
"""


def title_line(report: Report) -> str:
    return f"{report.config.model_title()} on {report.dataset.name}"


def data_line(report: Report) -> str:
    data = report.dataset
    splits = f"; {data.splits}" if data.splits else ""
    return (
        f"{len(data.class_names)} classes; {len(data.train):,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test images of {data.test.shape[2]} by {data.test.shape[1]} pixels{splits}."
        f"{_skipped(report)}"
    )


def note_lines(report: Report) -> list[str]:
    """What the columns mean and what was measured on; in Markdown."""
    config, tested = report.config, len(report.dataset.test)
    precision = f"{config.amp_dtype} autocast" if config.uses_amp() else "float32"
    processor = cpu_features().get("cpu_name") or platform.processor()
    kernels = f", {_native.active_isa()}" if _native.backend() == "native" else ""
    return [
        f"*accuracy*: on the test images, which nothing was chosen by; with {tested:,} of them its standard error is "
        f"{_standard_error(report):.1%}.",
        "*density*: share of the convolution and linear weights that are not zero. *size*: of the weight file, in "
        "which a mostly-zero tensor is stored as bits and values.",
        f"*memory*: weights, and the most by which a process grows while {memory.IMAGES} images go through.",
        f"*latency*: median at batch 1; *images/s*: at batch {min(config.batch_size, tested)}; the float networks run "
        "in float32.",
        f"Training: {precision}, seed {config.seed}. The plain PyTorch loop does the same work for one epoch (same "
        "network, batches, augmentation ranges, loss and optimizer) with `affine_grid` + `grid_sample` in float32.",
        f"Machine: {processor}, {platform.system()} {platform.machine()}, {torch.get_num_threads()} threads; "
        f"imgopt_fast {__version__} ({_native.backend()}{kernels}), torch {torch.__version__}, "
        f"Python {platform.python_version()}.",
    ]


def time_lines(report: Report) -> list[str]:
    """Where the time went: a line per stage with the share of each phase."""
    lines = []
    for stage, seconds in report.times.items():
        total = sum(seconds.values())
        shares = ", ".join(f"{phase} {value / max(total, 1e-9):.1%}" for phase, value in seconds.items())
        lines.append(f"{title(stage, report.config)} {total:.1f} s ({shares})")
    return lines


def _times(report: Report) -> str:
    return "; ".join(time_lines(report))


def _skipped(report: Report) -> str:
    count = len(report.dataset.skipped)
    return f" {count} images that cannot be read were left out." if count else ""


def _layers(report: Report) -> str:
    if report.layers is None:
        return ""
    return f"""The layers of the int8 network: what they run in, their shares of the time, the activations in memory \
meanwhile, and the signal to noise ratio of the result when one alone is int8: low is bad, and \
`Int8Config(exclude=...)` keeps a layer float.

```
{report.layers}
```

![layers](layers.png)

"""


def _unreadable(report: Report) -> str:
    if not report.dataset.skipped:
        return ""
    lines = "\n".join(f"- `{name}`: {reason}" for name, reason in report.dataset.skipped)
    return f"Left out:\n\n{lines}\n\n"


def _standard_error(report: Report) -> float:
    top1 = report.stages[-1].test_top1
    return float((top1 * (1 - top1) / len(report.dataset.test)) ** 0.5)
