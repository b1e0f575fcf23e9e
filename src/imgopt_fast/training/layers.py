"""What each layer of a trained network really runs in, its share of the time, and what int8 costs there."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imgopt_fast.compress import Int8Config, PruneConfig, sensitivity
from imgopt_fast.compress.prune import masked_layers
from imgopt_fast.compress.prune.report import measure
from imgopt_fast.compress.quantize import Int8Model, QuantizationReport, profile

REPEATS = 5  # the fastest of so many runs: what disturbs a run only ever adds time


def layer_table(
    module: nn.Module, images: Tensor, before: nn.Module | None = None, *, power_of_two: bool = False
) -> str:
    """A line per layer of `module`, measured on prepared `images`, a batch.

    Of an int8 network: what the layer's arithmetic runs in, why it is not int8 where it is not, and, where the float
    network `before` it is given, the signal to noise ratio when that layer alone is int8 (with `power_of_two` scales).
    Of a pruned one: density, kernel, time beside torch's dense layer, and the density at which the two are equal; that
    takes a second per layer. Of others: times.
    """
    if isinstance(module, Int8Model):
        return str(int8_layers(module, images, before, power_of_two=power_of_two))
    masked = {name: (layer, PruneConfig().structure) for name, layer in masked_layers(module)}
    return str(measure(module, masked, images)) if masked else _times(module, images)


def int8_layers(
    module: Int8Model, images: Tensor, before: nn.Module | None, *, power_of_two: bool = False
) -> QuantizationReport:
    """The report of `module` with what its layers take on `images` and, where `before` is given, do to its result."""
    ranked = [] if before is None else sensitivity(before, [images], Int8Config(power_of_two=power_of_two))
    return module.report.measured(profile(module, images), ranked)


@torch.no_grad()
def _times(module: nn.Module, images: Tensor) -> str:
    """Layers, types and shares of the time of a float network."""
    seconds: dict[str, float] = {}
    began: dict[str, float] = {}
    layers = {name: part for name, part in module.named_modules() if not any(True for _ in part.children())}

    def now() -> float:
        if images.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(name: str, *ignored: Any) -> None:
        began[name] = now()

    def after(name: str, *ignored: Any) -> None:
        seconds[name] = min(seconds.get(name, float("inf")), now() - began[name])

    hooks: list[Callable[[], None]] = []
    for name, layer in layers.items():
        hooks.append(layer.register_forward_pre_hook(partial(before, name)).remove)
        hooks.append(layer.register_forward_hook(partial(after, name)).remove)
    try:
        for _ in range(REPEATS):
            module.eval()(images)
    finally:
        for remove in hooks:
            remove()
    total, width = sum(seconds.values()), max(map(len, [*seconds, "layer"]))
    lines = [f"{'layer':{width}}  {'operation':20}  {'runs in':8}  {'time':>6}"]
    for name, spent in seconds.items():
        dtype = str(next((p.dtype for p in layers[name].parameters()), images.dtype)).removeprefix("torch.")
        lines.append(f"{name:{width}}  {type(layers[name]).__name__:20}  {dtype:8}  {spent / total:6.1%}")
    return "\n".join(lines)
