"""TrainConfig: from its file and back, and every value that cannot work is named."""

import math
from pathlib import Path
from typing import Any

import pytest

from imgopt_fast.training import TrainConfig


def test_config_comes_back_from_its_file(tmp_path: Path) -> None:
    config = TrainConfig(data="somewhere", epochs=3, scale=(0.5, 2.0), amp=False, experiment="x")
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("lr: 1\nscale: [1, 2]\n")
    assert TrainConfig.load(tmp_path / "config.yaml") == TrainConfig(lr=1.0, scale=(1.0, 2.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "there is no option 'epoch'"),
        ("epochs: many", "epochs: expected int, got 'many'"),
        ("epochs: true", "epochs: expected int, got True"),
        ("scale: 1.0", "scale: expected a list of 2, got 1.0"),
        ("- 1", "expected names and values, got list"),
        ("a: [", "not a YAML file"),
        ("epochs: 0", "epochs: expected at least 1, got 0"),
    ],
)
def test_a_wrong_config_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": -1},
        {"lr": -0.1},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"sparsity": 1.0},
        {"hflip": 1.5},
        {"reprob": -0.5},
        {"mixup": -1.0},
        {"clip_grad": 0.0},
        {"opt": "lion"},
        {"weight_decay": -1.0},
        {"scale": (2.0, 1.0)},
        {"validation": 0.5},
        {"img_size": 4},
        {"sched": "poly"},
        {"qat_lr": -0.1},
        {"unfreeze": 3},
        {"unfreeze": 20, "transfer": "frozen", "pretrained": "a"},
        {"layer_decay": 0.0},
        {"grad_accum_steps": 0},
        {"grad_sampling": 0},
        {"model_ema_decay": 1.0},
        {"distill_epochs": -1},
        {"l1": -0.1},
        {"transfer": "frozen"},
        {"kd_cache": True, "mixup": 0.2},
        {"experiment": "a/b"},
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(values))}: expected .*, got "):
        TrainConfig(**values)
