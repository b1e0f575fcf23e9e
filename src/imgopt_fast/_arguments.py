"""Checks of plain arguments that the torch and the NumPy face of an operation share; needs neither of them.

Every error names the argument, says what was expected and what came.
"""

import math
from collections.abc import Collection, Sequence


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """`value`, which has to be one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def per_channel(name: str, value: float | Sequence[float], channels: int) -> list[float]:
    """`value` as a list of `channels` floats; a single number serves all channels."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [float(value)] * channels
    try:
        values = [float(v) for v in value]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number or a sequence of numbers, got {value!r}") from None
    if len(values) != channels:
        raise ValueError(f"{name}: expected one number or {channels}, one per channel, got {len(values)}")
    return values


def uint8_fill(fill: list[float]) -> list[float]:
    """Fill of a uint8 image: rounded half to even, as it becomes a pixel."""
    for value in fill:
        if not 0 <= value <= 255:
            raise ValueError(f"fill: expected values in 0..255 for uint8 images, got {value}")
    return [float(round(value)) for value in fill]


def normalization(
    mean: float | Sequence[float] | None, std: float | Sequence[float] | None, channels: int
) -> tuple[list[float], list[float]]:
    """`mean` and `std` per channel; two empty lists where neither is given, 0 and 1 for one that is missing."""
    if mean is None and std is None:
        return [], []
    means = per_channel("mean", 0.0 if mean is None else mean, channels)
    stds = per_channel("std", 1.0 if std is None else std, channels)
    for value in means:
        if not math.isfinite(value):
            raise ValueError(f"mean: expected finite values, got {value}")
    for value in stds:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"std: expected positive finite values, got {value}")
    return means, stds
