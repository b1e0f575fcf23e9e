"""Hue and sharpness against torch, OpenCV and kornia.

The cases are those of imgopt_fast.benchmarks.photometric.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=False)
def test_photometric(compete: Callable[[], None]) -> None:
    compete()
