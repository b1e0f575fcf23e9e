"""masked_matmul against F.linear on w * m, torch's CSR and scipy's CSR.

The cases are those of imgopt_fast.benchmarks.masked_matmul.
"""

from collections.abc import Callable

import pytest


@pytest.mark.benchmark(max_time=0.2, min_rounds=3, warmup=False)
def test_masked_matmul(compete: Callable[[], None]) -> None:
    compete()
