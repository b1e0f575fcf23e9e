"""What the transforms share: the checks of their arguments, and the distributions of their parameters.

Every check names the argument: TypeError for what is no number where one is expected, ValueError for a wrong value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imgopt_fast.augment.geometry import Size
from imgopt_fast.ops.affine_warp import INTERPOLATIONS

Uniforms = NDArray[np.float64]
Fill = float | Sequence[float]

CROP_ATTEMPTS = 10  # torchvision's number of trials for a rectangle that fits

# ---------------------------------------------------------------------------------------------------- distributions


def between(u: Uniforms, bounds: tuple[float, float]) -> Uniforms:
    low, high = bounds
    return low + u * (high - low)


def trial_sides(
    u_area: Uniforms, u_aspect: Uniforms, size: Size, scale: tuple[float, float], log_ratio: tuple[float, float]
) -> tuple[Uniforms, Uniforms]:
    """Sides (a, b) of random rectangles with uniform area and log-uniform a / b, whole pixels; they may not fit."""
    area = between(u_area, scale) * (size[0] * size[1])
    ratio = np.exp(between(u_aspect, log_ratio))
    return np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))


# ---------------------------------------------------------------------------------------------------- arguments


def number(name: str, value: Any) -> float:
    """A finite number; TypeError or ValueError otherwise."""
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def integer(name: str, value: Any, least: int) -> int:
    """A whole number of at least `least`; TypeError or ValueError otherwise."""
    if not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return int(value)


def per_channel(name: str, values: Any) -> tuple[float, ...]:
    if not hasattr(values, "__len__") or isinstance(values, str):
        raise TypeError(f"{name}: expected one number per channel, got {values!r}")
    return tuple(number(name, v) for v in values)


def probability(p: float, name: str = "p") -> float:
    if not 0.0 <= number(name, p) <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {p}")
    return float(p)


def pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if not hasattr(values, "__len__") or isinstance(values, str):
        raise TypeError(f"{name}: expected two numbers, got {values!r}")
    if len(values) != 2:
        raise ValueError(f"{name}: expected two numbers, got {values!r}")
    return number(name, values[0]), number(name, values[1])


def interval(name: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = pair(name, values)
    if not low <= high:
        raise ValueError(f"{name}: expected (low, high), got {values!r}")
    return low, high


def symmetric(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    """A number d stands for (-d, d)."""
    values: Any = value  # a NumPy number is none of Python's
    if hasattr(values, "__len__"):
        return interval(name, values)
    most = number(name, values)
    if most < 0:
        raise ValueError(f"{name}: a single number must not be negative, got {value}")
    return -most, most


def height_width(size: int | Sequence[int]) -> Size:
    values: tuple[Any, ...]
    if isinstance(size, (int, np.integer)):
        values = (size, size)
    elif hasattr(size, "__len__") and not isinstance(size, str):
        values = tuple(size) * (2 if len(size) == 1 else 1)
    else:
        raise TypeError(f"size: expected a positive integer or (height, width), got {size!r}")
    if len(values) != 2 or not all(isinstance(v, (int, np.integer)) and v > 0 for v in values):
        raise ValueError(f"size: expected a positive integer or (height, width), got {size!r}")
    return int(values[0]), int(values[1])


def interpolation_name(interpolation: Any) -> str:
    """A name, or a member of torchvision's InterpolationMode."""
    name = getattr(interpolation, "value", interpolation)
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
    return str(name)


def fill_value(fill: Fill | None) -> float | tuple[float, ...]:
    if fill is None:
        return 0.0
    values: Any = fill
    return tuple(number("fill", f) for f in values) if hasattr(values, "__len__") else number("fill", values)
