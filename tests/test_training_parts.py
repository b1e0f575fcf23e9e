"""The parts of the loop against what they are by definition: gradients, updates, averages, transfer, teachers."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_training import QUICK, press_ctrl_c_at, results, tiny, tiny_network
from torch import nn

from imgopt_fast.augment import Compose, Normalize, RandomResizedCrop
from imgopt_fast.compress import Int8Config, MaskedSGD, PruneConfig, prune
from imgopt_fast.data import load_dataset
from imgopt_fast.models import create_model
from imgopt_fast.training import (
    InterruptedTrainingError,
    TrainConfig,
    evaluate,
    load_network,
    load_weights,
    resume,
    train,
)
from imgopt_fast.training.augmentation import Augmentation
from imgopt_fast.training.batch_size import saved_bytes, with_batch_size
from imgopt_fast.training.distributed import Process
from imgopt_fast.training.images import load_images
from imgopt_fast.training.network import requantize
from imgopt_fast.training.network import test_images as run_images
from imgopt_fast.training.optimizers import Averaged, Zeros, layer_groups, make_optimizer, proximal_l1
from imgopt_fast.training.sampled_gradients import SampledGradients
from imgopt_fast.training.transfer import freeze_body

pytestmark = pytest.mark.usefixtures("no_report")


PLAIN = "small_networks:no_batch_norm"

# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("count", "every"), [(12, 3), (7, 2), (5, 4), (3, 8)])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (6,)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Conv2d(6, 4, 3, 2, 1), (6, 7, 8)),
        (nn.Conv2d(6, 4, 3, padding=(1, 0), dilation=2, groups=2, bias=False), (6, 7, 8)),
    ],
)
def test_sampled_gradients_are_unbiased(
    layer: nn.Module, shape: tuple[int, ...], count: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = copy.deepcopy(layer).double()
    input = torch.randn(count, *shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(layer(input)).detach()
    exact = torch.autograd.grad((layer(input) * direction).sum(), [input, *layer.parameters()])
    parts = []
    for part in range(min(every, count)):
        monkeypatch.setattr(torch, "randint", lambda high, size, part=part: torch.tensor(part))
        with SampledGradients(every):
            output = layer(input)
        parts.append(torch.autograd.grad((output * direction).sum(), [input, *layer.parameters()]))
    torch.testing.assert_close(output, layer(input))
    for i, gradient in enumerate(exact):
        found = torch.stack([part[i] for part in parts])
        torch.testing.assert_close(found.mean(0), gradient)
        exact_in_every_part = i != 1  # all but the weight
        assert all(torch.allclose(f, gradient) for f in found) == exact_in_every_part


def test_sampled_gradients_train_any_network_in_bfloat16() -> None:
    for name in ("resnet8", "vit"):
        model = create_model(name, num_classes=3, in_channels=1)
        with torch.autocast("cpu", torch.bfloat16), SampledGradients(2):
            model(torch.rand(6, 1, 16, 16)).float().square().sum().backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters()
        )


def test_gradient_descent_sees_the_whole_set_whatever_the_batch(images: Path) -> None:
    weights = []
    for batch_size in (1000, 16, 7):
        config = tiny(images, f"gd {batch_size}", **QUICK | {"epochs": 3}, model=PLAIN, opt="gd", batch_size=batch_size)
        weights.append(load_weights(train(config).path / "model.safetensors"))
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_stop_among_accumulated_batches_waits_for_their_update(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = {"grad_accum_steps": 4, "model_ema_decay": 0.9, "grad_sampling": 2, "opt": "adam", "lr": 0.002}
    whole = train(tiny(images, "accumulated whole", **QUICK, **ways))
    press_ctrl_c_at(monkeypatch, 2)
    with pytest.raises(InterruptedTrainingError):
        train(tiny(images, "accumulated stopped", **QUICK, **ways))
    stopped = resume(images.parent / "runs" / "accumulated stopped")
    assert results(stopped.path) == results(whole.path)
    first, second = (load_weights(run.path / "model.safetensors") for run in (whole, stopped))
    assert all(first[name].equal(second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------- updates


def test_the_proximal_step_reaches_the_minimum_and_its_zeros() -> None:
    target = torch.tensor([[1.0, -0.02, 0.3, -0.5, 0.05]])
    weight = nn.Parameter(torch.randn(1, 5))
    optimizer = torch.optim.SGD([weight], 0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (weight - target).square().sum()).backward()
        optimizer.step()
        proximal_l1(optimizer, 0.1)
    expected = target.sign() * (target.abs() - 0.1).clamp_min(0)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-5)
    assert weight.detach()[0, 1] == 0 == weight.detach()[0, 4]


def test_proximal_training_ends_with_exact_zeros(images: Path) -> None:
    report = train(tiny(images, "l1", **QUICK | {"epochs": 2}, l1=0.1))
    assert report.stages[0].density < 0.9


def test_averaged_weights_are_the_moving_average_and_respect_masks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pruner = prune(model, PruneConfig(sparsity=0.5))
    averaged, expected = Averaged(model, 0.9), None
    for _ in range(5):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(4, 4))
            model[1].running_mean.add_(1)
        pruner.step()
        averaged.update(model)
        now = model[0].weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(averaged.module[0].weight.detach(), expected)
    assert averaged.module[1].running_mean.equal(model[1].running_mean)
    pruner.layers["0"].set_mask(torch.eye(4, dtype=torch.bool))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    averaged.update(model)
    assert averaged.module[0].weight.count_nonzero() == 4


def test_zeros_stay_zeros() -> None:
    sparse, dense = nn.Linear(4, 4), nn.Linear(4, 4)
    with torch.no_grad():
        sparse.weight[:2] = 0
    zeros = Zeros(nn.Sequential(sparse, dense))
    with torch.no_grad():
        for layer in (sparse, dense):
            layer.weight.add_(1)
    zeros.step()
    assert sparse.weight.count_nonzero() == 8
    assert dense.weight.count_nonzero() == 16


def test_lower_layers_learn_less() -> None:
    model = create_model("resnet8", num_classes=3, in_channels=1)
    assert len(layer_groups(model)) == 2 + 3 + 1  # conv1, bn1, a block for each of three stages, fc
    groups = make_optimizer(model, nn.Module(), TrainConfig(layer_decay=0.5), 0.8).param_groups
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.fc.weight)] == rate[id(model.fc.bias)] == 0.8
    assert rate[id(model.layer3[0].conv1.weight)] == rate[id(model.layer3[0].bn2.bias)] == 0.4
    assert rate[id(model.conv1.weight)] == pytest.approx(0.8 * 0.5**5)
    assert len(rate) == len(list(model.parameters()))
    freeze_body(model)
    groups = make_optimizer(model, nn.Module(), TrainConfig(), 0.8).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(model.fc.weight), id(model.fc.bias)}


def test_pruned_layers_are_moved_by_their_own_optimizer() -> None:
    model = create_model("resnet8", num_classes=3, in_channels=1)
    assert type(make_optimizer(model, nn.Module(), TrainConfig(), 0.1)) is torch.optim.SGD
    prune(model, PruneConfig(sparsity=0.9))
    optimizer = make_optimizer(model, nn.Module(), TrainConfig(weight_decay=0.1), 0.1)
    assert isinstance(optimizer, MaskedSGD)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(torch.rand(8, 1, 12, 12)), torch.arange(8) % 3).backward()
    optimizer.step()
    layer = model.layer3[0].conv1
    assert torch.equal(layer.weight != before["layer3.0.conv1.weight"], layer.weight_mask)
    assert isinstance(make_optimizer(model, nn.Module(), TrainConfig(opt="adamw"), 0.1), torch.optim.AdamW)


def test_parts_of_a_batch_cover_it_with_their_halo() -> None:
    index = torch.arange(10, 21)
    for world in (2, 3):
        parts = [Process(rank, world).share(2)(index) for rank in range(world)]  # type: ignore[misc]
        assert torch.cat([part[2:] for part in parts]).equal(index)
        assert parts[0][:2].tolist() == [19, 20]
        assert parts[1][:2].tolist() == parts[0][-2:].tolist()
    assert Process().share(2) is None


def test_half_precision_and_compilation_train(images: Path) -> None:
    for name, way in {"half": {"amp": True, "amp_dtype": "float16"}, "compiled": {"torchcompile": "eager"}}.items():
        report = train(dataclasses.replace(tiny(images, name, **QUICK), **way))
        assert report.epochs[0].train_loss < 2


# ------------------------------------------------------------------------------------------------------- batch size


def test_what_the_backward_pass_keeps_is_counted() -> None:
    """A convolution keeps its input, a batch norm its input and two numbers a channel, a ReLU its output."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
    images = torch.rand(4, 2, 5, 5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    each = 4 * 25 * (2 + 3 + 3) + 25 * 3  # in float32, and what dropout kept
    some, more = (saved_bytes(model, part, None) for part in (images[:2], images))
    assert more - some == pytest.approx(2 * each, abs=64 * 4)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("ways", "count", "free", "size", "lr"),
    [
        ({}, 10_000, None, 128, 0.2),
        ({}, 2900, None, 64, 0.1),
        ({}, 50, None, 8, 0.0125),
        ({}, 10_000, 40, 16, 0.025),
        ({}, 10_000, 0, 8, 0.0125),
        ({"batch_size": 96}, 50, 0, 96, 0.15),
        ({"grad_accum_steps": 4}, 2900, None, 64, 0.4),
        ({"opt": "adamw"}, 2900, None, 64, 0.002 * 0.5**0.5),
        ({"opt": "gd"}, 50, None, 8, 0.2),
        ({"lr": 0.3}, 50, None, 8, 0.3),
    ],
)
def test_few_images_and_little_memory_make_small_batches(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    ways: dict[str, Any],
    count: int,
    free: int | None,
    size: int,
    lr: float,
) -> None:
    """`free`: the images that the memory holds beside those that must stay free."""
    dataset = load_dataset(images)
    model, prepare = tiny_network(3, 1), Compose([Normalize((0.0,), (1.0,))])
    precision = None
    batch = prepare(dataset.train.first(4).images)
    each = (saved_bytes(model, batch, precision) - saved_bytes(model, batch[:2], precision)) / 2
    monkeypatch.setattr(
        "imgopt_fast.training.batch_size.free_bytes", lambda device: None if free is None else 2 * free * each + 1
    )
    many = dataclasses.replace(dataset, train=dataset.train.take(torch.arange(count) % len(dataset.train)))
    config = with_batch_size(TrainConfig(amp=False, **ways), many, model, prepare, Process())
    assert config.batch_size == size
    assert config.lr == pytest.approx(lr)
    assert (config.prune_lr, config.qat_lr) == (pytest.approx(lr / 2), pytest.approx(lr / 40))
    assert with_batch_size(config, dataset, model, prepare, Process()) == config


# ------------------------------------------------------------------------------------------------------- crops


def test_crops_come_from_the_larger_images(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training images are kept at their size, held-out ones at the network's; a view is one warp of the former."""
    settings = QUICK | {"img_size": 8, "source_size": 12, "crop_scale": (0.3, 0.6), "crop_ratio": (0.8, 1.25)}
    config = tiny(images, "cropped", **settings | {"quantize": "int8", "qat_epochs": 0, "epochs": 2})
    dataset = load_images(config)
    assert dataset.train.shape == (1, 12, 12)
    assert dataset.validation.shape == dataset.test.shape == (1, 8, 8)
    whole = load_dataset(images, image_size=12).test.images
    small = F.interpolate(whole.float(), (8, 8), mode="bilinear", antialias=True)
    assert (dataset.test.images.float() - small).abs().mean() < 6  # of noise with a deviation of 10
    still = dataclasses.replace(config, hflip=0.0, degrees=0.0, translate=0.0, scale=(1.0, 1.0))
    augment = Augmentation(still, Normalize((0.0,), (1.0,)), 3, (8, 8))
    batch = dataset.train.first(4)
    for epoch in range(2):
        view = augment(batch.images, batch.labels, (0, epoch, torch.arange(4)))
        crop = RandomResizedCrop((8, 8), (0.3, 0.6), (0.8, 1.25))
        expected = crop(batch.images, key=(0, epoch, torch.arange(4))) / 255
        inside = (..., slice(1, -1), slice(1, -1))  # at its edge the image blends with the affine map's fill
        torch.testing.assert_close(view.images[inside], expected[inside], atol=3e-3, rtol=0)
    report = train(config)
    network = load_network(report.path)
    assert (network.card.height, network.card.width) == (8, 8)
    assert (
        evaluate.accuracy(network.module, run_images(report.path), network.card.prepare())
        == report.stages[-1].test_top1
    )
    requantize(report.path, Int8Config(power_of_two=True))
    press_ctrl_c_at(monkeypatch, 5)
    with pytest.raises(InterruptedTrainingError):
        train(dataclasses.replace(config, experiment="stopped"))
    resume(report.path.parent / "stopped")
    assert results(report.path.parent / "stopped") == results(report.path)
    for wrong, words in (
        ({"img_size": None}, "--img-size"),
        ({"crop_scale": None}, "--crop-scale"),
        ({"source_size": 7}, "at least"),
        ({"crop_scale": (0.5, 1.5)}, "at most 1"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(config, **wrong)
