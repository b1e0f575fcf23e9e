"""What became of each pruned layer: how much is left, what computes it, and, measured on demand, what that gains.

Times are those of inference, the packed layer against torch's dense one on the same input, alternated, medians.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imgopt_fast.compress.prune.structure import random_mask
from imgopt_fast.nn.masked import MaskedConv2d, MaskedLinear
from imgopt_fast.nn.packed import PackedMaskedConv2d, PackedMaskedLinear
from imgopt_fast.ops.masked_matmul import PackedMaskedWeight

MaskedLayer = MaskedLinear | MaskedConv2d
SECONDS = 0.02  # per contest and contestant: some hundred calls of a small layer, five of a large one
# Densities among which break-even is bracketed, then halved on a logarithmic scale.
GRID = (0.01, 1.0)
HALVINGS = 5  # to within 1.15 times


class LayerReport(NamedTuple):
    """One pruned layer. Bytes are those of the weight; the measured figures are None where nothing was measured."""

    name: str
    shape: tuple[int, ...]
    density: float
    kernel: str
    dense_bytes: int
    packed_bytes: int  # of `nn.pack`, for inference
    dense_seconds: float | None = None
    seconds: float | None = None
    break_even: float | None = None  # the density below which the layer is faster than dense; 0: nowhere

    @property
    def speedup(self) -> float | None:
        """Times faster than dense."""
        return None if self.seconds is None or self.dense_seconds is None else self.dense_seconds / self.seconds


class PruningReport(tuple[LayerReport, ...]):
    """The layers in the order of the model; printed as a table."""

    def __str__(self) -> str:
        measured = any(layer.seconds is not None for layer in self)
        rows = [("layer", "weight", "density", "memory", "kernel")]
        rows[0] += ("dense", "pruned", "faster", "break-even") if measured else ()  # type: ignore[assignment]
        for layer in self:
            memory = f"{layer.packed_bytes / max(1, layer.dense_bytes):.0%}"
            row: tuple[str, ...] = (
                layer.name, "x".join(map(str, layer.shape)), f"{layer.density:.1%}", memory, layer.kernel
            )  # fmt: skip
            if measured:
                row += _figures(layer)
            rows.append(row)  # type: ignore[arg-type]
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def describe(layers: Mapping[str, tuple[MaskedLayer, str]]) -> PruningReport:
    """Rows without times, of layers and their structures by name."""
    return PruningReport(_row(name, layer) for name, (layer, _) in layers.items())


def measure(model: nn.Module, layers: Mapping[str, tuple[MaskedLayer, str]], example: Any) -> PruningReport:
    """Rows with times, each layer on what it is given when the model sees `example`; a layer not reached has none."""
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0].detach()

        return keep

    hooks = [layer.register_forward_pre_hook(note(name)) for name, (layer, _) in layers.items()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return PruningReport(
        _timed(_row(name, layer), layer, structure, inputs[name]) if name in inputs else _row(name, layer)
        for name, (layer, structure) in layers.items()
    )


def contest(dense: Callable[[], Any], ours: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both, called in turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for call in (dense, ours):
        call()
    while len(seconds[0]) < 5 or min(map(sum, seconds)) < SECONDS:
        for call, found in zip((dense, ours), seconds, strict=True):
            begin = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _row(name: str, layer: MaskedLayer) -> LayerReport:
    packed = _packed(layer, layer.weight_mask)
    return LayerReport(
        name, tuple(layer.weight.shape), layer.density(), _kernel(packed.packed), layer.weight.nbytes, packed.nbytes()
    )


def _timed(row: LayerReport, layer: MaskedLayer, structure: str, input: Tensor) -> LayerReport:
    dense = _dense(layer, input)
    with torch.no_grad():
        packed = _packed(layer, layer.weight_mask)
        before, after = contest(dense, lambda: packed(input))
        return row._replace(
            dense_seconds=before, seconds=after, break_even=_break_even(layer, structure, input, dense)
        )  # fmt: skip


def _break_even(layer: MaskedLayer, structure: str, input: Tensor, dense: Callable[[], Any]) -> float:
    def wins(density: float) -> bool:
        generator = torch.Generator().manual_seed(0)
        mask = random_mask(layer.weight.shape, structure, density, generator).to(layer.weight.device)
        packed = _packed(layer, mask)
        before, after = contest(dense, lambda: packed(input))
        return after <= before

    low, high = GRID
    if wins(high):
        return high
    if not wins(low):
        return 0.0
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if wins(middle) else (low, middle)
    return low


def _packed(layer: MaskedLayer, mask: Tensor) -> PackedMaskedLinear | PackedMaskedConv2d:
    kind = PackedMaskedLinear if isinstance(layer, MaskedLinear) else PackedMaskedConv2d
    packed = kind(layer)  # type: ignore[arg-type]
    if mask is not layer.weight_mask:
        packed._pack(layer.weight.detach(), mask)
    return packed


def _dense(layer: MaskedLayer, input: Tensor) -> Callable[[], Tensor]:
    weight = torch.where(layer.weight_mask, layer.weight.detach(), 0)
    if isinstance(layer, MaskedLinear):
        return lambda: F.linear(input, weight, layer.bias)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(input, weight, layer.bias, *geometry)


def _kernel(packed: PackedMaskedWeight) -> str:
    """What serves the layer, and what its mask was seen to consist of."""
    if packed.values.dim() != 1:
        return "dense product"
    text = f"row quads, {packed.structure_name}, blocks of {packed.block}"
    return text if packed.dense is None else f"{text}, few samples dense"


def _figures(layer: LayerReport) -> tuple[str, ...]:
    if layer.seconds is None or layer.dense_seconds is None or layer.break_even is None:
        return ("not reached",)
    return (
        f"{layer.dense_seconds * 1e3:.3f} ms",
        f"{layer.seconds * 1e3:.3f} ms",
        f"{layer.speedup:.2f}x",
        f"{layer.break_even:.0%}",
    )
