"""Weights as int8, symmetric, one scale per output channel."""

import torch
from torch import Tensor

from imgopt_fast.compress.quantize.config import Int8Config

LEVELS = 127  # −128 is left out: a symmetric range keeps rounding unbiased
# How far below the largest magnitude a scale may clip: under a half, clipping always costs more than rounding saves.
SHRINK = torch.linspace(1.0, 0.5, 26, dtype=torch.float64)
# Largest bias in steps of input_scale · weight_scale; a channel with a larger one gets a coarser scale, which costs
# nothing: next to such a bias its weights hardly count. 22 bits leave room for the products in int32, and for half a
# step of the output in float32, in which QONNX engines add.
BIAS_STEPS = 2.0**22
# Weights whose candidates are tried together: they stay in the cache, which takes a sixth of the time that a layer of
# two million takes as a whole.
CHUNK = 1 << 15
SMALLEST_SCALE = 2.0**-40  # for channels without weights: inside what the kernels accept


def quantize_weight(
    weight: Tensor, bias: Tensor | None, input_scale: float, config: Int8Config, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(int8 weight, float32 scale per output channel) of a float weight whose first axis is the output channel.

    A given `scale` is kept. Else "mse" calibration searches each channel's scale for the least squared error; the
    others map the largest magnitude to 127. A channel whose bias would not fit into int32 gets a coarser scale.
    """
    rows = weight.detach().double().flatten(1)
    if scale is None:
        scale = _choose_scale(rows, bias, input_scale, config)
    stored = _round(rows, scale.double())
    return stored.to(torch.int8).reshape(weight.shape), scale


def _choose_scale(rows: Tensor, bias: Tensor | None, input_scale: float, config: Int8Config) -> Tensor:
    scale = (rows.abs().amax(1) / LEVELS).clamp(min=SMALLEST_SCALE)
    if bias is not None:
        scale = torch.maximum(scale, bias.detach().double().abs() / (input_scale * BIAS_STEPS))
    if config.power_of_two:
        exponent = torch.log2(scale)
        candidates = torch.stack([exponent.ceil(), exponent.floor()]).exp2()
        candidates = candidates.clamp(min=SMALLEST_SCALE)
    elif config.calibration == "mse":
        candidates = scale * SHRINK.to(scale.device)[:, None]
    else:
        return scale.float()
    if bias is not None:
        fits = bias.detach().double().abs() / (input_scale * candidates) <= BIAS_STEPS * (1 + 1e-9)
    else:
        fits = torch.ones_like(candidates, dtype=torch.bool)
    few = max(1, CHUNK // max(1, rows.shape[1]))
    parts = zip(rows.split(few), candidates.split(few, 1), strict=True)
    error = torch.cat([torch.stack([_error(part, step) for step in steps]) for part, steps in parts], 1)
    best = torch.where(fits, error, torch.inf).argmin(0)
    return candidates.gather(0, best[None])[0].float()


def _error(rows: Tensor, scale: Tensor) -> Tensor:
    return (rows - _round(rows, scale) * scale[:, None]).square().sum(1)


def _round(rows: Tensor, scale: Tensor) -> Tensor:
    return torch.round(rows / scale[:, None]).clamp(-LEVELS, LEVELS)
