"""`imgopt-fast doctor` tells the truth: fine where it is fine, broken where it is broken."""

import argparse

import pytest
import torch
from conftest import BACKEND

from imgopt_fast import _native
from imgopt_fast.cli import doctor


def examine() -> int:
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return doctor.run(parser.parse_args(["doctor"]))


def test_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert examine() == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "everything works" in text
    for name in ("affine_warp", "int8_conv2d", "masked_matmul"):
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert {"native": "native", "numba": "Numba", "reference": "plain torch"}[BACKEND] in line
    if _native.core() is not None:
        assert f"instruction set {_native.active_isa()}" in text
        assert "GOP/s" in text


def test_a_wrong_result_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("imgopt_fast.affine_warp", lambda images, matrix: images)
    assert examine() == 1
    text = capsys.readouterr().out
    assert "BROKEN      affine_warp: a wrong result" in text
    assert "everything works" not in text


def test_a_backend_that_cannot_be_had_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backend() -> str:
        raise ValueError("IMGOPT_BACKEND: expected one of native, numba, reference, got 'gpu'")

    monkeypatch.setattr(_native, "backend", backend)
    assert examine() == 1
    assert "got 'gpu'" in capsys.readouterr().out


def test_missing_pieces_come_with_their_price_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "core", lambda: None)
    advice = "\n".join(doctor.missing())
    assert "slower" in advice
    assert "IMGOPT_REQUIRE_NATIVE=1" in advice


def test_a_package_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor, "import_module", load)
    monkeypatch.setattr("imgopt_fast.benchmarks.machine.version_of", lambda name: "0.28.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    state = doctor.optional_state("torchvision", "models")
    assert state.startswith("0.28.0, cannot be imported: operator torchvision::nms does not exist;")
    assert state.endswith("(the build for +cpu, from the index that torch came from)")
