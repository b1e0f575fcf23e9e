"""What the tests share: instruction sets to run on, and skips that are loud where they must not happen."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from imgopt_fast import _native

# "native" outside the runs that force another backend: the tests of the kernels then apply.
BACKEND = _native.backend()


def require(condition: bool, reason: str) -> None:
    """Skip with `reason`; in CI fail instead: a machine that should have it and does not is a broken machine."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"required in CI: {reason}")
    pytest.skip(reason)


@pytest.fixture(params=_native.supported_isas() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for every instruction set that this processor has; skipped without compiled kernels."""
    if BACKEND != "native":
        pytest.skip(f"the {BACKEND} backend has no instruction sets")
    before = _native.active_isa()
    _native.set_isa(request.param)
    assert _native.active_isa() == request.param
    yield request.param
    assert before is not None
    _native.set_isa(before)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
