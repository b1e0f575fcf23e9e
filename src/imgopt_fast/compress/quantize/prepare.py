"""From a model and calibration batches to a plan: trace, fold, fuse, equalize, observe, choose scales, correct."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import nn
from torch.fx import Node

from imgopt_fast.compress.quantize.calibrate import Scale, choose_scale, images_of, observe
from imgopt_fast.compress.quantize.config import Int8Config
from imgopt_fast.compress.quantize.correct import correct_bias
from imgopt_fast.compress.quantize.equalize import equalize
from imgopt_fast.compress.quantize.fold import fold
from imgopt_fast.compress.quantize.fuse import PASSING, Fusion, fuse
from imgopt_fast.compress.quantize.plan import Plan, scaled_nodes
from imgopt_fast.compress.quantize.power_of_two import choose_powers_of_two
from imgopt_fast.compress.quantize.rounding import optimize_rounding
from imgopt_fast.compress.quantize.trace import trace

# Images of the first batch on which biases are corrected and channels equalized. Their activations are held in memory
# for two networks at once; a channel's mean over 32 images is far closer than the rounding that it corrects.
SAMPLE = 32


def make_plan(model: nn.Module, calibration: Iterable[Any], config: Int8Config) -> Plan:
    """Trace and calibrate `model`; arguments and errors are those of `quantize`."""
    if not isinstance(config, Int8Config):
        raise TypeError(f"config: expected an Int8Config, got {type(config).__name__}")
    batches = images_of(calibration, model)
    first = next(batches, None)
    if first is None:
        raise ValueError("calibration: expected at least one batch of images, got none")
    graph, image_size = trace(model, first)
    fold(graph)
    fusion = fuse(graph, config.exclude)
    _check_finite(fusion)
    names = {node: operation.name for node, operation in fusion.operations.items()}
    if config.equalize:
        equalize(graph, fusion, first[:SAMPLE])
    histograms = observe(graph, scaled_nodes(fusion), chain([first], batches), names)
    if config.power_of_two:
        scales = choose_powers_of_two(fusion, histograms, config)
    else:
        scales = {node: choose_scale(histogram, config) for node, histogram in histograms.items()}
    _share_concat_scales(fusion, scales)
    plan = Plan(graph, image_size, tuple(first.shape[1:]), fusion, scales, config)
    if config.rounds_second_order:
        optimize_rounding(plan, first[:SAMPLE])
    if config.bias_correction:
        correct_bias(plan, first[:SAMPLE])
    return plan


def _check_finite(fusion: Fusion) -> None:
    """Calibration would blame the first layer that sees the value, which equalization may move."""
    for operation in fusion.operations.values():
        for name, value in (("weight", operation.weight), ("bias", operation.bias)):
            if value is not None and not bool(value.isfinite().all()):
                raise ValueError(
                    f"model: the {name} of {operation.name}, batch norm folded in, is not finite; load other weights"
                )


def _share_concat_scales(fusion: Fusion, scales: dict[Node, Scale]) -> None:
    """Give what only a concat reads the scale of the concat: its values are then copied, not rounded again."""
    for node, operation in fusion.operations.items():
        for source in operation.inputs if operation.kind == "concat" else ():
            if fusion.operations[source].kind not in PASSING and set(fusion.readers[source]) == {node}:
                scales[source] = scales[node]
