"""Out of PyTorch: the formats that a trained network is exported to, a file per target.

Every target has `write(network or model, path, ...)` and `engines(path, ...)`: what runs the written file without us.
`export` writes beside the destination, lets the engines run it, compares, and only then puts it in its place.
"""

import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from imgopt_fast.compress.quantize import Int8Model
from imgopt_fast.targets import verification
from imgopt_fast.targets.fresh_process import median_seconds
from imgopt_fast.targets.network import Network, describe
from imgopt_fast.targets.verification import Check, Engine, ExportReport

__all__ = ["Check", "Engine", "ExportReport", "Format", "Network", "describe", "export"]

Format = Literal["onnx", "c", "qonnx", "stablehlo", "pt2"]
SAMPLE = 4  # images on which every tensor is compared


def export(
    model: nn.Module,
    format: Format,
    path: str | Path,
    *,
    images: Tensor | None = None,
    labels: Tensor | None = None,
    verify: bool = True,
    **options: Any,
) -> ExportReport:
    """Write `model` to `path` in `format`, run it there with another engine, and report how it does.

    Args:
        model: what `compress.quantize` returned, or a float model, pruned ones included (onnx, stablehlo and pt2).
            c and qonnx want `Int8Config(power_of_two=True)`.
        format: "onnx", "c", "qonnx", "stablehlo" or "pt2".
        path: the file to write; for c and stablehlo the folder. What is there already is replaced.
        images: float32 (N, C, H, W) as the model takes them, to verify with. An int8 model can do without: random
            images then stand in. A float model needs them for its input shape.
        labels: (N,) classes of `images`; the report then has accuracies.
        verify: run the exported network. Without, nothing but the exporter's own packages is needed.
        options: of one format. onnx: `form`, "qdq" (default) or "qlinear". pt2: `aoti`, for AOTInductor. c: `mean` and
            `std` per channel, to take raw uint8 pixels too; `name`, the prefix of every C name.

    Raises ValueError for a layer that the format cannot carry (it is named, with the way out), and where the exported
    network does not compute what the model does; ImportError, with the command, where a package is missing. In every
    case what was at `path` before is still there, whole.
    """
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    if labels is not None and (images is None or len(labels) != len(images)):
        raise ValueError("labels: expected one for each of `images`")
    target = import_module(f"{__name__}.{format}")
    _require(target, verify)
    path = Path(path)
    sample = _sample(model, images)
    network = target.describe(model, sample) if hasattr(target, "describe") else describe(model, sample)
    partial = path.with_name(f".partial-{path.name}")
    _remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        notes = tuple(target.write(network, partial, **options) or ())
        report = ExportReport(format, str(path), _size(partial), notes=notes)
        if verify:
            report = _verify(report, model, network, target.engines(partial, network, **options), images, labels)
        _replace(partial, path)
    finally:
        _remove(partial)
    return report


def _verify(
    report: ExportReport,
    model: nn.Module,
    network: Network,
    engines: list[Engine],
    images: Tensor | None,
    labels: Tensor | None,
) -> ExportReport:
    """`report` with what the engines found."""
    ours = [] if images is None else verification.outputs_of(model, images)
    accuracy = None if labels is None else float((ours[0].flatten(1).argmax(1) == labels).double().mean())
    checks = tuple(verification.check(network, engine, images, labels, ours) for engine in engines)
    with torch.no_grad():
        latency = median_seconds(lambda: model(network.images[:1]))
    return ExportReport(
        report.format, report.path, report.size, checks, accuracy, latency, report.notes, report.details
    )


def _sample(model: nn.Module, images: Tensor | None) -> Tensor:
    if images is not None:
        if images.ndim != 4 or not images.is_floating_point() or not len(images):
            raise ValueError(
                f"images: expected floating (N, C, H, W), N at least 1, got {images.dtype} of {tuple(images.shape)}"
            )
        return images[:SAMPLE].float().cpu()
    if not isinstance(model, Int8Model):
        raise ValueError("images: expected a batch of the model's input, from which a float model's shape is taken")
    return torch.randn(SAMPLE, *model.input_shape, generator=torch.Generator().manual_seed(0))


def _require(target: Any, verify: bool) -> None:
    """ImportError with the command to type, where a package is missing."""
    wanted = (*target.PACKAGES, *(target.VERIFIERS if verify else ()))
    missing = [name for name in wanted if find_spec(name) is None]
    if missing:
        hint = "" if set(missing) & set(target.PACKAGES) else ", or verify=False (--no-verify)"
        raise ImportError(
            f"{', '.join(missing)}: not installed; expected pip install 'imgopt-fast[{target.EXTRA}]'{hint}"
        )


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def _replace(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`. A folder cannot be replaced in one step: the old one is moved aside first."""
    if not path.is_dir():
        new.replace(path)
        return
    old = path.with_name(f".replaced-{path.name}")
    _remove(old)
    path.rename(old)
    new.rename(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
