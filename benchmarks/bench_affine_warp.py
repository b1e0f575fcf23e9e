"""affine_warp against affine_grid + grid_sample, OpenCV and kornia.

The cases are those of imgopt_fast.benchmarks.affine_warp.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
def test_affine_warp(compete: Callable[[], None]) -> None:
    compete()
