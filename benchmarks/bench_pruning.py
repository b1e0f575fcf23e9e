"""A pruned network's training step, its optimizer, and inference of a pruned ResNet-18, against dense layers in torch.

The cases are those of imgopt_fast.benchmarks.pruning.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.5, min_rounds=3, warmup=False)
def test_pruning(compete: Callable[[], None]) -> None:
    compete()
