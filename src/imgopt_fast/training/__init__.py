"""From images to a small, fast classifier: the loop, the recipe around it, and the folder that a run leaves behind.

The names below are resolved on first use: the command line reads TrainConfig without importing torch.
"""

from importlib import import_module
from typing import Any

_HOME_OF = {
    "DivergedError": "loop",
    "EpochRow": "report",
    "InterruptedTrainingError": "loop",
    "Report": "report",
    "StageRow": "report",
    "TrainConfig": "config",
    "load_network": "network",
    "load_weights": "imgopt_fast.compress",
    "resume": "recipe",
    "save_weights": "imgopt_fast.compress",
    "train": "recipe",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME_OF[name]
    return getattr(import_module(home if "." in home else f"{__name__}.{home}"), name)
