"""ResNet-18, ResNet-50 and MobileNetV2 in int8 against torch, torch fx int8, onnxruntime and OpenVINO.

The cases are those of imgopt_fast.benchmarks.networks.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=False)
def test_networks(compete: Callable[[], None]) -> None:
    compete()
