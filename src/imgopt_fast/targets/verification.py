"""An exported network against the one that it was made from, computed by an engine that is not ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imgopt_fast.targets.fresh_process import median_seconds
from imgopt_fast.targets.network import Network

Array = np.ndarray[Any, Any]
BATCH = 64  # images per call where accuracy is counted
# What an engine may differ by that is free to round in its own way, as `Check.noise`. Float networks: sums in another
# order gave 1e-12 at most. int8 networks: 2e-7, and 8e-5 where the network rounds half up and the engine half to even
# (the networks of the tests in onnxruntime and OpenVINO). A single wrong row of a last layer gives 0.1 and more.
MOST_NOISE_FLOAT, MOST_NOISE_INT8 = 1e-6, 1e-2


@dataclass(frozen=True)
class Engine:
    """Something that runs the exported file. Engines take and give NumPy arrays, float32 images first."""

    name: str  # with its version
    run: Callable[[Array], list[Array]]  # (N, C, H, W) to the network's outputs
    inspect: Callable[[Array], Mapping[str, Array]] | None = None  # to values inside, by their names
    exact: bool = False  # any differing bit is an error
    seconds: Callable[[Array], float] | None = None  # per image, where a call from Python would not tell


@dataclass(frozen=True)
class Difference:
    """How far the elements of one tensor are from ours: in steps of its scale, or in real units where it is float."""

    name: str
    share: float  # of the elements that differ
    largest: float
    quantized: bool


@dataclass(frozen=True)
class Check:
    """What one engine made of the exported network."""

    engine: str
    differences: tuple[Difference, ...]  # of the outputs, and of every tensor that the engine shows
    noise: float  # energy of the difference to our outputs, as a share of that of the outputs around their mean
    agreement: float  # share of the images that get the same class
    accuracy: float | None  # share of the labelled images
    latency: float  # seconds for one image

    @property
    def tensors(self) -> str:
        """The int8 tensors in one line."""
        compared = [d for d in self.differences if d.quantized]
        unequal = [d for d in compared if d.largest]
        if not unequal:
            return f"{len(compared)} int8 tensors bit-equal" if compared else ""
        worst = max(unequal, key=lambda d: d.share)
        return (
            f"{len(compared) - len(unequal)} of {len(compared)} int8 tensors bit-equal; the first other is "
            f"{unequal[0].name} ({unequal[0].share:.2%} off, {unequal[0].largest:.0f} at most), the worst {worst.name} "
            f"({worst.share:.2%} off, {worst.largest:.0f} at most)"
        )

    @property
    def outputs(self) -> str:
        largest = max((d.largest for d in self.differences if not d.quantized), default=0.0)
        return "bit-equal" if largest == 0 else f"within {largest:.2g}"


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it does in the hands of each engine."""

    format: str
    path: str
    size: int  # bytes of everything written
    checks: tuple[Check, ...] = ()
    accuracy: float | None = None  # of the network that was exported
    latency: float | None = None  # its seconds for one image, here
    notes: tuple[str, ...] = ()
    details: str = field(default="", repr=False)  # a longer text of the format's own

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table that the command line prints: HEAD says what they are."""
        ours = ("", "imgopt_fast", "", "", _percent(self.accuracy), "", _milliseconds(self.latency))
        if not self.checks:
            return [(self.format, "not verified", "", "", "", f"{self.size / 1024:,.0f} KiB", "")]
        theirs = [
            (
                self.format if i == 0 else "",
                check.engine,
                check.outputs,
                f"{check.agreement:.2%}",
                _percent(check.accuracy),
                f"{self.size / 1024:,.0f} KiB" if i == 0 else "",
                _milliseconds(check.latency),
            )
            for i, check in enumerate(self.checks)
        ]
        return [*theirs, ours]

    def __str__(self) -> str:
        lines = [table([self]), *(f"{c.engine}: {c.tensors}" for c in self.checks if c.tensors)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), f"written: {self.path}"])


HEAD = ("format", "engine", "outputs", "same class", "accuracy", "size", "latency")


def table(reports: list[ExportReport]) -> str:
    """The reports side by side."""
    rows = [HEAD, *(row for report in reports for row in report.rows())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    cells = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([cells[0], "─" * len(cells[0]), *cells[1:]])


def check(network: Network, engine: Engine, images: Tensor | None, labels: Tensor | None, ours: list[Tensor]) -> Check:
    """Run `engine` on the sample of `network`, and on `images`, whose outputs are `ours`.

    Raises ValueError where an exact engine differs by a bit, and another by more than rounding explains: what was
    written is then not the network.
    """
    sample = network.images.numpy()
    found = engine.run(sample)
    expected = [network.tensors[value] for value in network.outputs]
    if len(found) != len(expected):
        raise ValueError(f"{engine.name}: gives {len(found)} outputs, the network has {len(expected)}")
    names = [network.values[value].name for value in network.outputs]
    differences = [_difference(*pair, False) for pair in zip(names, found, expected, strict=True)]
    if engine.inspect is not None:
        inside = engine.inspect(sample)
        differences += [
            _difference(value.name, inside[value.name], tensor, True)
            for value, tensor in zip(network.values, network.tensors, strict=True)
            if value.quantized and value.name in inside
        ]
    if images is None:
        images, ours = network.images, expected[:1]
    theirs = torch.cat([torch.from_numpy(np.array(engine.run(part.numpy())[0])) for part in images.split(BATCH)])
    classes = theirs.flatten(1).argmax(1)
    agreement = float((classes == ours[0].flatten(1).argmax(1)).double().mean())
    accuracy = None if labels is None else float((classes == labels).double().mean())
    unequal = [d for d in differences if d.largest]
    if engine.exact and unequal:
        raise ValueError(
            f"{engine.name}: {unequal[0].name} differs in {unequal[0].share:.2%} of its elements, by "
            f"{unequal[0].largest:g} at most, from the network, and this format has to be exact"
        )
    most = MOST_NOISE_INT8 if network.rounds else MOST_NOISE_FLOAT
    noise = _noise(theirs, ours[0])
    if not noise <= most:
        raise ValueError(
            f"{engine.name}: its outputs differ by {noise:.1%} of the energy of the network's own, where rounding "
            f"explains {most:.4%}; {agreement:.1%} of the images get the same class"
        )
    seconds = engine.seconds or (lambda x: median_seconds(lambda: engine.run(x)))
    return Check(engine.name, tuple(differences), noise, agreement, accuracy, seconds(sample[:1]))


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The first output of `model` for all of `images`."""
    return [torch.cat([_first(model(part)) for part in images.split(BATCH)])]


def _first(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = next(iter(result.values() if isinstance(result, dict) else result))
    return result.float().cpu()


def _difference(name: str, found: Array, expected: Tensor, quantized: bool) -> Difference:
    reference = expected.numpy()
    if found.shape != reference.shape:
        raise ValueError(f"{name}: expected shape {reference.shape}, the engine gives {found.shape}")
    distance = np.abs(found.astype(np.float64) - reference.astype(np.float64))
    unequal = ~(distance == 0)  # NaN counts
    return Difference(name, float(unequal.mean()), float(distance.max()) if distance.size else 0.0, quantized)


def _noise(found: Tensor, expected: Tensor) -> float:
    """`Check.noise`: 0 for equal outputs, infinite for those of a constant network that are not; NaN for NaN."""
    difference = (found.double() - expected.double()).square().sum()
    energy = (expected.double() - expected.double().mean()).square().sum()
    return float(difference / energy) if difference != 0 else 0.0


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3f} ms"
