"""The networks: shapes, sizes as published, and the ways to name one."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from imgopt_fast.models import MODELS, absolute_file, create_model

# Parameters for 1,000 classes and RGB as published for the first three; counted by hand for the CIFAR networks (10).
PARAMETERS = {
    ("resnet18", 1000): 11_689_512,
    ("resnet50", 1000): 25_557_032,
    ("mobilenetv2", 1000): 3_504_872,
    ("resnet20", 10): 272_474,
    ("resnet8", 10): 308_650,
    ("vit", 10): 1_793_866,
}


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_count(name: str, classes: int) -> None:
    model = create_model(name, num_classes=classes, in_channels=3)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, classes]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 33)])
def test_forward_and_backward(name: str, channels: int, side: int) -> None:
    model = create_model(name, num_classes=7, in_channels=channels)
    logits = model(torch.rand(2, channels, side, side))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_network_can_be_traced() -> None:
    for name in MODELS:
        torch.fx.symbolic_trace(create_model(name, num_classes=3, in_channels=3))


def linear(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def other_names(classes: int) -> nn.Module:
    return nn.Linear(classes, classes)


def nothing(num_classes: int, in_channels: int) -> None:
    return None


def test_a_network_from_elsewhere() -> None:
    model = create_model(f"{__name__}:linear", num_classes=4, in_channels=1)
    assert model(torch.rand(2, 1, 5, 5)).shape == (2, 4)


def test_a_network_of_a_file_and_its_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file is called, from its folder and from any other."""
    (tmp_path / "head_of_it.py").write_text("from torch.nn import LazyLinear as Head\n")
    (tmp_path / "math.py").write_text(
        "import torch.nn as nn\nfrom head_of_it import Head\n\n"
        "def small(num_classes, **others):\n    return nn.Sequential(nn.Flatten(), Head(num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    name = absolute_file("math.py:small")
    monkeypatch.chdir("/")
    assert name == f"{tmp_path}/math.py:small"
    assert create_model(name, num_classes=4, in_channels=1)(torch.rand(2, 1, 5, 5)).shape == (2, 4)
    assert [absolute_file(other) for other in ("resnet8", "a.b:c")] == ["resnet8", "a.b:c"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "model: expected one of resnet8, .*, package.module:function or file.py:function, got 'resnet'"),
        ("no.such.module:f", "model: cannot import 'no.such.module:f'"),
        (f"{__name__}:missing", "model: cannot import"),
        (f"{__name__}:nothing", "returned NoneType, expected a torch.nn.Module"),
        (f"{__name__}:MODELS", "is no function but of type dict"),
        ("missing.py:f", "model: cannot import 'missing.py:f': FileNotFoundError"),
        ("math:sqrt", r"'math:sqrt' is called with num_classes=N and in_channels=N, which sqrt\(x, /\) does not take"),
        (f"{__name__}:other_names", r"which other_names\(classes: int\) does not take: missing a required"),
    ],
)
def test_a_network_that_does_not_exist(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, num_classes=4, in_channels=1)


def test_a_network_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def create(name: str, **arguments: object) -> nn.Module:
        made.append((name, arguments))
        return nn.Identity()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create))
    create_model("timm/resnet10t", num_classes=4, in_channels=1)
    assert made == [("resnet10t", {"pretrained": False, "num_classes": 4, "in_chans": 1})]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm/resnet10t needs timm, which cannot be imported here"):
        create_model("timm/resnet10t", num_classes=4, in_channels=1)
