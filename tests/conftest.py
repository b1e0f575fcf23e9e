"""What the tests share: instruction sets to run on, and skips that are loud where they must not happen."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from imgopt_fast import _native

if TYPE_CHECKING:
    from imgopt_fast.training import Report

# "native" outside the runs that force another backend: the tests of the kernels then apply.
BACKEND = _native.backend()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test's own for decoded images."""
    monkeypatch.setenv("IMGOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def require(condition: bool, reason: str) -> None:
    """Skip with `reason`; in CI fail instead: a machine that should have it and does not is a broken machine."""
    if condition:
        return
    if os.environ.get("CI"):
        pytest.fail(f"required in CI: {reason}")
    pytest.skip(reason)


def optional(name: str) -> Any:
    """The module `name` of an optional package; skips where it is missing, except in CI, which installs them all."""
    try:
        return pytest.importorskip(name)
    except pytest.skip.Exception as missing:
        if os.environ.get("CI"):
            pytest.fail(f"required in CI: {missing}")
        raise


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


@pytest.fixture(params=_native.supported_isas() if BACKEND == "native" else [BACKEND])
def isa_or_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set, or the backend that is forced: for tests that every backend passes in reasonable time."""
    before = _native.active_isa()
    if BACKEND == "native":
        _native.set_isa(request.param)
    yield request.param
    if BACKEND == "native" and before:
        _native.set_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: two threads on a busy machine only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device() -> torch.device:
    """Where the CUDA kernels run: on a device, or in the emulator, which cuda_device.py explains."""
    return torch.device("cpu" if os.environ.get("IMGOPT_CUDA_EMULATED") else "cuda")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training on the embedded data: dense, pruned and int8. Tests do not write into it."""
    return _trained(tmp_path_factory, epochs=1, prune_epochs=1)


@pytest.fixture(scope="session")
def trained_bottlenecks_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a depthwise network, dense and int8."""
    return _trained(tmp_path_factory, model="small_networks:bottlenecks", epochs=1, sparsity=0.0, qat_epochs=0)


def _trained(tmp_path_factory: pytest.TempPathFactory, **options: Any) -> Path:
    from imgopt_fast.training import TrainConfig, evaluate, train

    output = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = TrainConfig(
        warmup_epochs=0.5, reference_epoch=False, memory=False, output=str(output), experiment="trained", **options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        return train(config).path


@pytest.fixture
def few_images(tmp_path: Path) -> Path:
    """A class folder of a test's own; see tiny_training."""
    from tiny_training import make_images

    return make_images(tmp_path / "images")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests of a file; their runs lie beside it."""
    from tiny_training import make_images

    return make_images(tmp_path_factory.mktemp("shared") / "images")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> "Report":
    """A whole tiny training, for the tests that only look at it."""
    from tiny_training import make_images, tiny

    from imgopt_fast.training import evaluate, train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        return train(tiny(make_images(tmp_path_factory.mktemp("tiny") / "images"), "run"))


@pytest.fixture
def quick_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies at the end of a training take no time."""
    from imgopt_fast.training import evaluate

    monkeypatch.setattr(evaluate, "LEAST_SECONDS", 0.01)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch, quick_measurements: None) -> None:
    """The figures take longer than a tiny training."""
    from imgopt_fast.training import recipe

    monkeypatch.setattr(recipe, "write_report", lambda *arguments: None)


@pytest.fixture(scope="session")
def inverted_bottlenecks() -> nn.Module:
    """A MobileNetV2 of four blocks with random weights: expansions, depthwise convolutions, ReLU6, linear residuals."""
    generator = torch.Generator().manual_seed(1)

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(outputs)
        with torch.no_grad():
            fan = inputs // groups * kernel**2
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * fan**-0.5 * 1.4)
            norm.weight.copy_(torch.rand(outputs, generator=generator) + 0.5)
            norm.bias.copy_(torch.randn(outputs, generator=generator) * 0.3)
        return [layer, norm]

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
            super().__init__()
            hidden = inputs * expansion
            self.conv = nn.Sequential(
                *conv(inputs, hidden, 1), nn.ReLU6(), *conv(hidden, hidden, 3, stride, hidden), nn.ReLU6(),
                *conv(hidden, outputs, 1),
            )  # fmt: skip
            self.residual = stride == 1 and inputs == outputs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x) if self.residual else self.conv(x)

    blocks = [Block(8, 8, 1, 3), Block(8, 12, 2, 4), Block(12, 12, 1, 4), Block(12, 16, 2, 3)]
    classes = nn.Linear(32, 10)
    with torch.no_grad():
        classes.weight.copy_(torch.randn(10, 32, generator=generator) * 32**-0.5)
        classes.bias.zero_()
    head = [*conv(16, 32, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classes]
    return nn.Sequential(*conv(3, 8, 3, 2), nn.ReLU6(), *blocks, *head).eval()
