"""The figures of a run folder. matplotlib takes half a second to import and is imported when the first one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from imgopt_fast.data import Dataset, Split
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.config import TrainConfig
from imgopt_fast.training.stages import title

if TYPE_CHECKING:
    from imgopt_fast.compress.quantize import QuantizationReport
    from imgopt_fast.training.report import EpochRow

DPI = 120
COLUMNS, ROWS = 8, 3  # of the mistakes that are shown
WORST = 3  # layers that are marked
SAMPLES = 12  # augmented images that are shown
GAP = 20  # of the width of an image between it and what became of it


def curves(path: Path, rows: Sequence[EpochRow], config: TrainConfig) -> None:
    """Loss, validation accuracy and density over the epochs, the stages after the first one shaded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row.epoch for row in rows]
    shown = (
        ("training loss", [row.train_loss for row in rows]),
        ("validation accuracy, %", [100 * row.eval_top1 for row in rows]),
        ("density of the weights, %", [100 * row.density for row in rows]),
    )
    later = {stage: [row.epoch for row in rows if row.stage == stage] for stage in ("pruned", "distilled", "qat")}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(shown))
    for axes, (what, values) in zip(panels, shown, strict=True):
        axes.plot(epochs, values, marker="o", markersize=3)
        for color, (stage, within) in zip(("tab:orange", "tab:green", "tab:purple"), later.items(), strict=True):
            if within:
                axes.axvspan(within[0] - 0.5, within[-1] + 0.5, alpha=0.12, color=color, label=title(stage, config))
        axes.set(title=what, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        axes.grid(alpha=0.3)
    panels[-1].set_ylim(0, 105)
    if len(stages := panels[0].get_legend_handles_labels()[0]) > 0:
        figure.legend(handles=stages, loc="outside lower center", ncols=len(stages), frameon=False)
    figure.savefig(path, dpi=DPI)


def confusion(path: Path, labels: Tensor, found: Tensor, class_names: Sequence[str]) -> None:
    """Share of the images of each class (row) that was taken for each class (column), in percent."""
    from matplotlib.figure import Figure

    classes = len(class_names)
    counts = (labels * classes + found).bincount(minlength=classes**2).view(classes, classes)
    shares = 100 * counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    side = max(3.0, min(0.6 * classes + 1.5, 20.0))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    if classes <= 20:  # beyond, the numbers would overlap
        for row, column in torch.cartesian_prod(torch.arange(classes), torch.arange(classes)).tolist():
            share = shares[row, column].item()
            if share > 0.5:  # less would be a 0
                color = "white" if share > 50 else "black"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(classes), class_names, rotation=45, ha="right")
        axes.set_yticks(range(classes), class_names)
    axes.set(xlabel="found", ylabel="is")
    figure.savefig(path, dpi=DPI)


def mistakes(path: Path, split: Split, found: Tensor, class_names: Sequence[str]) -> None:
    """The first images of `split` whose class was not found, with what was found and what they are."""
    from matplotlib.figure import Figure

    wrong = (found != split.labels).nonzero().flatten()[: COLUMNS * ROWS].tolist()
    rows = max(1, -(-len(wrong) // COLUMNS))
    figure = Figure(figsize=(1.3 * COLUMNS, 1.75 * rows), layout="constrained")
    if not wrong:
        figure.text(0.5, 0.5, f"none of the {len(split):,} test images", ha="center", va="center", color="tab:gray")
    for i, axes in enumerate(figure.subplots(rows, COLUMNS).flat):
        axes.axis("off")
        if i < len(wrong):
            image = split.images[wrong[i]].cpu().permute(1, 2, 0).squeeze(-1).numpy()
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            is_class, found_class = (class_names[int(labels[wrong[i]])] for labels in (split.labels, found))
            axes.set_title(f"found {found_class}\nis {is_class}", fontsize=7)
    figure.savefig(path, dpi=DPI)


def layers(path: Path, report: QuantizationReport) -> None:
    """Of each int8 layer, from the first to the last: the signal to noise ratio of the result when it alone is int8,
    the worst ones marked, and its share of the time."""
    from matplotlib.figure import Figure

    rows = [layer for layer in report.layers if layer.decibels is not None]
    decibels = [layer.decibels or 0.0 for layer in rows]
    finite = [value for value in decibels if math.isfinite(value)]  # a layer of zeros, or of exact weights, adds none
    worst = sorted(finite)[:WORST]
    figure = Figure(figsize=(9, 1.2 + 0.17 * max(len(rows), 4)), layout="constrained")
    noise, times = figure.subplots(1, 2, sharey=True)
    colors = ["tab:red" if value in worst else "tab:blue" for value in decibels]
    noise.barh(range(len(rows)), [min(value, max(finite, default=0.0)) for value in decibels], color=colors)
    noise.set_yticks(range(len(rows)), [layer.name for layer in rows], fontsize=7)
    noise.set(title="signal to noise with it alone in int8, dB (low is bad)", ylim=(len(rows) - 0.4, -0.6))
    times.barh(range(len(rows)), [100 * (layer.share or 0.0) for layer in rows], color="tab:gray")
    times.set(title="share of the time, %")
    for axes in (noise, times):
        axes.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=DPI)


def samples(path: Path, dataset: Dataset, augment: Augmentation, seed: int) -> None:
    """Training images before and after the augmentation of the first epoch, with the parameters that were drawn."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    batch = dataset.train.sample(SAMPLES)
    view = augment(batch.images, batch.labels, (seed, 0, torch.arange(len(batch))))
    shown = augment.sources(batch.images, view.draws)
    figure = Figure(figsize=(10.5, 2.1 * -(-SAMPLES // 3)), layout=ConstrainedLayoutEngine(wspace=0.06))
    for i, axes in enumerate(figure.subplots(-(-SAMPLES // 3), 3).flat):
        axes.axis("off")
        if i < len(batch):
            source = batch.images[i : i + 1].cpu().float() / 255
            source = F.interpolate(source, shown.shape[2:], mode="bilinear", antialias=True)[0]  # of larger sources
            gap = torch.ones(*source.shape[:2], -(-source.shape[2] // GAP))
            pair = torch.cat([source, gap, shown[i].cpu()], dim=2).clamp(0, 1)
            axes.imshow(pair.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            name = dataset.class_names[int(batch.labels[i])]
            drawn = "\n".join(textwrap.fill(draw, 64) for draw in view.draws.describe(i).split("  "))
            axes.set_title(f"{name}\n{drawn}", fontsize=6)
    figure.savefig(path, dpi=DPI)
