"""What a user can decide about quantization."""

from dataclasses import dataclass
from typing import Literal, get_args

Calibration = Literal["minmax", "percentile", "mse", "entropy"]
Rounding = Literal["nearest", "second_order"]


@dataclass(frozen=True)
class Int8Config:
    """How `quantize` chooses scales, and what it leaves alone.

    Activations are uint8 with one scale and zero point per tensor (zero point 0 behind a ReLU); weights are int8,
    symmetric, one scale per output channel.

    Args:
        calibration: how the range of an activation follows from the values seen. "minmax" takes all of it; "percentile"
            keeps `percentile` % of the values; "mse" minimises the expected squared
            error of rounding and clipping; "entropy" minimises the Kullback-Leibler divergence to the 8-bit histogram.
        percentile: share of the values kept, in (50, 100], for "percentile" only.
        power_of_two: every scale a power of two and the arithmetic shifts only (`requantize="shift"`), for hardware
            without multipliers behind its accumulators.
        equalize: move scale between consecutive layers so that no channel has less than 4 bits (cross-layer).
        bias_correction: take the mean shift that rounded weights cause out of the bias.
        rounding: "nearest" rounds each weight for itself; "second_order" chooses the directions for the least error of
            the layer's output on the first calibration batch (Frantar et al. 2022), which takes seconds and helps most
            where layers are small or scales are powers of two. None: "second_order" with `power_of_two`, "nearest"
            without. `qat` trains the weights and does not use it; layers of more than 8192 inputs an output are rounded
            to the nearest.
        exclude: qualified names of modules that stay float, each with all below it: "layer1" covers "layer1.0.conv1".
    """

    calibration: Calibration = "mse"
    percentile: float = 99.99
    power_of_two: bool = False
    equalize: bool = True
    bias_correction: bool = True
    rounding: Rounding | None = None
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (("calibration", get_args(Calibration)), ("rounding", (*get_args(Rounding), None))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile: expected a number in (50, 100], got {self.percentile}")
        if isinstance(self.exclude, str) or not all(isinstance(name, str) for name in self.exclude):
            raise TypeError(f"exclude: expected a tuple of module names, got {self.exclude!r}")
        for flag in ("power_of_two", "equalize", "bias_correction"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"{flag}: expected a bool, got {getattr(self, flag)!r}")

    @property
    def rounds_second_order(self) -> bool:
        return self.rounding == "second_order" or (self.rounding is None and self.power_of_two)
