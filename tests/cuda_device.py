"""Where the tests of the CUDA kernels run: a device, or the emulator of tests/cuda_emulator.

Without a device every test that imports this is skipped, loudly; IMGOPT_REQUIRE_CUDA=1 makes that a failure.
test_cuda_emulated.py runs the same files with the kernels compiled for the processor (IMGOPT_CUDA_EMULATED names that
library).
"""

import os
from typing import Any

import pytest
import torch

EMULATED = os.environ.get("IMGOPT_CUDA_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)
elif not torch.cuda.is_available():
    if os.environ.get("IMGOPT_REQUIRE_CUDA") == "1":
        raise RuntimeError("IMGOPT_REQUIRE_CUDA=1, but there is no CUDA device")
    pytest.skip("no CUDA device: the CUDA kernels run on the emulator only", allow_module_level=True)
KEY = "CPU" if EMULATED else "CUDA"


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value
