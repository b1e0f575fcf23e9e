"""int8_conv2d against F.conv2d, torch's quantized engines, onnxruntime and OpenVINO.

The cases are those of imgopt_fast.benchmarks.int8_conv2d.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
def test_int8_conv2d(compete: Callable[[], None]) -> None:
    compete()
