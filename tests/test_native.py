"""The choice of backend and instruction set, each seen from a fresh interpreter as a user would see it."""

import os
import subprocess
import sys

import pytest
from conftest import BACKEND

from imgopt_fast import _native

needs_native = pytest.mark.skipif(BACKEND != "native", reason=f"the {BACKEND} backend is forced")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("IMGOPT_ISA", "IMGOPT_BACKEND")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env})


@needs_native
@pytest.mark.parametrize("isa", _native.supported_isas())
def test_forced_isa_takes_effect(isa: str) -> None:
    code = "from imgopt_fast import _native; print(_native.active_isa())"
    assert python(code, IMGOPT_ISA=isa).stdout.strip() == isa


@needs_native
def test_default_isa_is_the_best_supported() -> None:
    code = "from imgopt_fast import _native; print(_native.active_isa())"
    assert python(code).stdout.strip() == _native.supported_isas()[-1]


@needs_native
@pytest.mark.parametrize("module", ["ops", "numpy"])
def test_unknown_isa_is_an_error_that_lists_the_known(module: str) -> None:
    result = python(f"import imgopt_fast.{module}", IMGOPT_ISA="avx1024")
    assert result.returncode != 0
    assert "ValueError: IMGOPT_ISA: expected one of scalar" in result.stderr
    assert "got 'avx1024'" in result.stderr


@needs_native
def test_set_isa_rejects_unknown_names_and_keeps_the_old() -> None:
    before = _native.active_isa()
    with pytest.raises(ValueError, match="expected one of"):
        _native.set_isa("sse9")
    assert _native.active_isa() == before


def test_unknown_backend_is_an_error() -> None:
    result = python("import imgopt_fast.ops", IMGOPT_BACKEND="fortran")
    assert "ValueError: IMGOPT_BACKEND: expected one of native, numba, reference, got 'fortran'" in result.stderr


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_forced_backend_takes_effect(backend: str) -> None:
    code = (
        "import imgopt_fast.ops.affine_warp, torch; from imgopt_fast import _native; print(_native.backend(), "
        "torch._C._dispatch_has_kernel_for_dispatch_key('imgopt_fast::affine_warp', 'CPU'))"
    )
    assert python(code, IMGOPT_BACKEND=backend).stdout.split() == [backend, str(backend == "numba")]


@needs_native
def test_numpy_face_does_not_import_torch() -> None:
    result = python("import sys, imgopt_fast.numpy; print('torch' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr
