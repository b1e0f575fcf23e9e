"""Networks that begin with what another one knows, and those that learn from a teacher."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import QUICK, press_ctrl_c_at, results, tiny, tiny_network
from torch import nn

from imgopt_fast.augment import Normalize
from imgopt_fast.compress import qat
from imgopt_fast.models import create_model
from imgopt_fast.training import (
    InterruptedTrainingError,
    TrainConfig,
    evaluate,
    load_network,
    load_weights,
    recipe,
    resume,
    save_weights,
    train,
)
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.images import load_images
from imgopt_fast.training.optimizers import make_optimizer
from imgopt_fast.training.teachers import Objective
from imgopt_fast.training.transfer import freeze_body, read_checkpoint, training_mode, transfer_weights

pytestmark = pytest.mark.usefixtures("no_report")


# ------------------------------------------------------------------------------------------------------- transfer


def test_rows_of_the_last_layer_follow_the_class_names() -> None:
    source, target = (create_model("resnet8", num_classes=n, in_channels=1) for n in (3, 4))
    before = target.fc.weight.detach().clone()
    left = transfer_weights(target, source.state_dict(), ("bee", "cow", "ant", "cat"), ("ant", "bee", "cat"))
    assert left == ["fc.weight[cow]", "fc.bias[cow]"]
    for row, origin in ((0, 1), (2, 0), (3, 2)):
        assert target.fc.weight[row].equal(source.fc.weight[origin])
        assert target.fc.bias[row].equal(source.fc.bias[origin])
    assert target.fc.weight[1].equal(before[1])
    assert target.layer2[0].bn1.running_var.equal(source.layer2[0].bn1.running_var)
    other = create_model("resnet8", num_classes=4, in_channels=3)
    left = transfer_weights(other, source.state_dict(), ("a", "b", "c", "d"), None)
    assert left == ["conv1.weight", "fc.weight", "fc.bias"]
    with pytest.raises(ValueError, match="the two networks share 0 of 2 weights by name and shape"):
        transfer_weights(nn.Sequential(nn.Linear(2, 2)), source.state_dict(), ("a", "b"), None)


def test_a_network_that_shares_a_minority_is_refused_and_named(images: Path, tmp_path: Path) -> None:
    small = create_model("resnet8", num_classes=3, in_channels=1)
    save_weights(small.state_dict(), tmp_path / "small.safetensors")
    ways = QUICK | {"model": "resnet20", "pretrained": str(tmp_path / "small.safetensors")}
    words = r"pretrained: \S+small\.safetensors and --model resnet20 share [1-9]\d* of \d+ weights by name and shape"
    with pytest.raises(ValueError, match=words):
        train(tiny(images, "larger", **ways))
    assert not (images.parent / "runs" / "larger").exists()


def test_without_a_name_the_network_is_that_of_the_run(images: Path, first: Path) -> None:
    report = train(tiny(images, "same", **QUICK | {"model": "", "pretrained": str(first)}))
    assert report.config.model == f"{tiny_network.__module__}:tiny_network"
    assert TrainConfig.load(report.path / "config.yaml").model == report.config.model


def test_checkpoints_of_other_programs(tmp_path: Path) -> None:
    weights = {"module.fc.weight": torch.ones(2, 3), "module.fc.bias": torch.zeros(2)}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "a.pth")
    assert list(read_checkpoint(tmp_path / "a.pth")) == ["fc.weight", "fc.bias"]
    save_weights({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    assert list(read_checkpoint(tmp_path / "b.safetensors")) == ["x"]
    (tmp_path / "c.pt").write_text("nothing")
    torch.save([1, 2], tmp_path / "d.pt")
    for name in ("c.pt", "d.pt"):
        with pytest.raises(ValueError, match=rf"{name}: not a file of weights"):
            read_checkpoint(tmp_path / name)


def test_a_frozen_body_keeps_weights_and_statistics() -> None:
    model = tiny_network(3, 1)
    freeze_body(model)
    before = copy.deepcopy(model.state_dict())
    training_mode(model)
    assert not model[1].training
    assert model[-1].training
    optimizer = make_optimizer(model, nn.Module(), TrainConfig(), 0.1)
    F.cross_entropy(model(torch.rand(8, 1, 12, 12)), torch.arange(8) % 3).backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {"8.weight", "8.bias"}


@pytest.fixture(scope="module")
def first(images: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "LEAST_SECONDS", 0.01)
        patch.setattr(recipe, "write_report", lambda *arguments: None)
        return train(tiny(images, "first", **QUICK | {"epochs": 3})).path


@pytest.mark.parametrize("transfer", ["frozen", "features"])
def test_transfer_trains_the_head_alone(images: Path, first: Path, transfer: str) -> None:
    config = tiny(images, transfer, **QUICK | {"epochs": 6}, pretrained=str(first), transfer=transfer)
    report = train(config)
    old, new = (load_weights(path / "model.safetensors") for path in (first, report.path))
    assert {name for name in old if not old[name].equal(new[name])} == {"8.weight", "8.bias"}
    assert len(report.epochs) == 6
    assert report.epochs[-1].train_loss < report.epochs[0].train_loss + 0.01
    assert report.stages[0].test_top1 > 0.5


@pytest.mark.parametrize("transfer", ["frozen", "features"])
def test_a_body_thaws_when_the_head_has_learned(
    images: Path, first: Path, transfer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = QUICK | {"epochs": 4, "unfreeze": 2, "pretrained": str(first), "transfer": transfer}
    whole = train(tiny(images, f"thawed {transfer}", **ways))
    assert [(row.epoch, row.stage) for row in whole.epochs] == [(1, "head"), (2, "head"), (3, "dense"), (4, "dense")]
    assert [row.stage for row in whole.stages] == ["dense"]
    old, new = (load_weights(path / "model.safetensors") for path in (first, whole.path))
    kept = {name for name in old if old[name].equal(new[name])}
    assert kept == {f"{i}.{name}" for i in (1, 4) for name in ("running_mean", "running_var", "num_batches_tracked")}
    for step in (3, 2 * 6 + 2)[transfer == "features" :]:  # while the head learns alone, and later
        press_ctrl_c_at(monkeypatch, step if transfer == "frozen" else step - 2 * 6)
        name = f"thawed {transfer} {step}"
        with pytest.raises(InterruptedTrainingError):
            train(tiny(images, name, **ways))
        assert results(resume(images.parent / "runs" / name).path) == results(whole.path)


def test_a_transferred_network_is_pruned_with_all_it_has(images: Path, first: Path) -> None:
    ways = QUICK | {"prune_epochs": 1, "pretrained": str(first), "transfer": "frozen"}
    path = train(tiny(images, "frozen and pruned", **ways)).path
    dense, pruned = load_weights(path / "dense.safetensors"), load_weights(path / "model.safetensors")
    kept = pruned["3.weight_mask"]
    assert dense["3.weight"].equal(load_weights(first / "model.safetensors")["3.weight"])
    assert pruned["3.weight"][kept].isclose(dense["3.weight"][kept]).float().mean() < 0.1


def test_finetuning_begins_where_the_other_ended(images: Path, first: Path) -> None:
    settings = QUICK | {"lr": 1e-9, "pretrained": str(first)}
    report = train(tiny(images, "finetuned", **settings))
    weights = tiny(images, "from weights", **settings | {"pretrained": str(first / "model.safetensors")})
    for path in (report.path, train(weights).path):
        old, new = load_weights(first / "model.safetensors"), load_weights(path / "model.safetensors")
        torch.testing.assert_close(new["0.weight"], old["0.weight"])
        torch.testing.assert_close(new["8.weight"], old["8.weight"])
    words = "first, a tiny_training:tiny_network, and --model resnet8 share 0 of"
    with pytest.raises(ValueError, match=words):
        train(tiny(images, "other", **settings | {"model": "resnet8"}))


# ------------------------------------------------------------------------------------------------------- teachers


def test_hints_and_tables_of_a_teacher_are_heard(images: Path, first: Path) -> None:
    taught = QUICK | {"distill": str(first)}
    ways: dict[str, dict[str, Any]] = {
        "taught": {},
        "hinted": {"kd_hint_weight": 1.0},
        "hinted only": {"kd_hint_weight": 1.0, "distill_loss_weight": 0.0},
        "table": {"kd_cache": True},
    }
    found = {name: results(train(tiny(images, name, **taught, **way)).path) for name, way in ways.items()}
    assert len({str(rows) for rows in found.values()}) == len(ways)
    again = train(tiny(images, "table again", **taught, kd_cache=True)).path
    assert results(again) == found["table"]


def test_hints_reach_a_student_in_quantization_aware_training(images: Path, first: Path) -> None:
    """The features are those that the simulated last layer is given: rounded, as int8 will round them."""
    config = tiny(images, "unused", **QUICK, kd_hint_weight=1.0)
    dataset = load_images(config)
    normalize = Normalize(*dataset.statistics())
    batch = dataset.train.first(16)
    augment = Augmentation(config, normalize, 3)
    view = augment(batch.images, batch.labels, (0, 0, torch.arange(16)))
    student = qat(tiny_network(3, 1).eval(), [view.images]).train()
    teacher = load_network(first).as_teacher(dataset)
    losses = []
    for weight in (0.0, 1.0):
        objective = Objective(dataclasses.replace(config, kd_hint_weight=weight), augment, dataset, student, teacher)
        losses.append(objective(student, view.images, view.targets, objective.taught(view)))
        objective.close()
    hint = losses[1] - losses[0]
    assert 0 < hint < 4  # the squared distance of two unit vectors
    (gradient,) = torch.autograd.grad(hint, student.simulation.layers["0"].weight)
    assert gradient.abs().max() > 0
    ways = {"qat": {}, "qat hinted": {"kd_hint_weight": 1.0}}
    taught = QUICK | {"pretrained": str(first), "epochs": 0, "quantize": "int8", "qat_epochs": 1, "distill": str(first)}
    found = [results(train(tiny(images, name, **taught, **way)).path) for name, way in ways.items()]
    assert found[0] != found[1]


def test_a_table_says_what_the_teacher_would(images: Path, first: Path) -> None:
    """Without augmentation both are the same training."""
    still = {"hflip": 0.0, "degrees": 0.0, "translate": 0.0, "scale": (1.0, 1.0), "distill": str(first)}
    losses = []
    for cached in (False, True):
        report = train(tiny(images, f"still {cached}", **QUICK, **still, kd_cache=cached))
        losses.append(report.epochs[0].train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
