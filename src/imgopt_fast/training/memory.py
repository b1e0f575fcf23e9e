"""The memory that inference takes, measured where nothing else runs: in a process of its own, started for it.

Weights in their stored form, plus the most by which the process grows while a batch goes through: activations and the
scratch of the kernels, of torch's allocator and of ours. Linux only, where a process can ask for its own peak.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

IMAGES = 32  # per call: small against a batch in training, large against the pages that the system counts in
SECONDS = 300.0


def peak_memory(run: Path, stages: Sequence[str]) -> dict[str, int]:
    """Bytes per stage of the run folder; empty where they cannot be measured."""
    if sys.platform != "linux":
        return {}
    command = [sys.executable, "-m", __name__, str(run), *stages]
    setting = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # a model may come from anywhere
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=setting)
    if result.returncode:
        return {}
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def _measure(run: Path, stages: Sequence[str]) -> dict[str, int]:
    import torch

    from imgopt_fast.training.network import load_network

    found = {}
    for stage in stages:
        network = load_network(run, stage)
        weights = sum(t.nbytes for t in network.module.state_dict().values())
        card = network.card
        images = torch.rand(IMAGES, card.channels, card.height, card.width)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            network.module(images[:1])  # packs weights, makes what is made once
            _give_back()
            before = _status("VmRSS")
            network.module(images)
        found[stage] = weights + max(0, _status("VmHWM") - before)
    return found


def _give_back() -> None:
    """Return free memory to the system and forget the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure(Path(sys.argv[1]), sys.argv[2:])))
