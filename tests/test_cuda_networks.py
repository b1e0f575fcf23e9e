"""Whole networks on a GPU: augmentation, quantization, pruning and the training recipe give what they give on the CPU.

Without a device every test here is skipped, loudly; IMGOPT_REQUIRE_CUDA=1 makes that a failure.
"""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from imgopt_fast import augment
from imgopt_fast.augment import ColorJitter, Compose, Normalize, RandomAffine, RandomHorizontalFlip
from imgopt_fast.compress import PruneConfig, profile, prune, qat, quantize
from imgopt_fast.models import create_model
from imgopt_fast.training import TrainConfig, train

if not torch.cuda.is_available():
    if os.environ.get("IMGOPT_REQUIRE_CUDA") == "1":
        raise RuntimeError("IMGOPT_REQUIRE_CUDA=1, but there is no CUDA device")
    pytest.skip("no CUDA device: networks on a GPU are not tested", allow_module_level=True)


@pytest.fixture
def model() -> nn.Module:
    return create_model("resnet8", num_classes=10, in_channels=3).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(64, 3, 32, 32)


def devices(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


def test_augmentation_draws_and_computes_the_same() -> None:
    transform = Compose([
        RandomHorizontalFlip(), RandomAffine(30, scale=(0.8, 1.2)), ColorJitter(0.2, 0.2, 0.2),
        Normalize((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)),
    ])  # fmt: skip
    images = torch.randint(0, 256, (32, 3, 40, 48), dtype=torch.uint8)
    key = (7, 3, range(100, 132))
    found = transform(images.cuda(), key=key)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), transform(images, key=key), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [
        augment.RandomVerticalFlip(), augment.RandomRotation(20, "bilinear", expand=True), augment.RandomPerspective(),
        augment.RandomCrop(32, padding=4, padding_mode="reflect"), augment.RandomResizedCrop(24),
        augment.CenterCrop(20), augment.Resize(30), ColorJitter(0.4, 0.4, 0.4, 0.1), augment.RandomGrayscale(0.5),
        augment.RandAugment(3, 12), augment.TrivialAugmentWide(), augment.RandomErasing(1.0),
        augment.RandomErasing(1.0, value="random"),
    ],
    ids=lambda transform: type(transform).__name__,
)  # fmt: skip
def test_every_transform_takes_images_on_the_gpu(transform: augment.Transform) -> None:
    images = torch.randint(0, 256, (24, 3, 40, 48), dtype=torch.uint8)
    key = (7, 3, range(100, 124))
    params = transform.make_params(images.cuda(), key=key)
    found = transform.transform(images.cuda(), params)
    assert found.is_cuda
    off = (found.cpu().int() - transform(images, key=key).int()).abs()
    assert (off > 1).float().mean() < 2e-3  # a coordinate next to a tie may fall on its other side
    points = torch.rand(24, 2, 2, dtype=torch.float64) * 40
    torch.testing.assert_close(
        transform.transform_keypoints(points.cuda(), params).cpu(), transform.transform_keypoints(points, params)
    )
    masks = images[:, :1]
    moved = transform.transform_masks(masks.cuda(), params).cpu()
    assert (moved != transform.transform_masks(masks, params)).float().mean() < 2e-3


@pytest.mark.parametrize("mix", [augment.MixUp(num_classes=4), augment.CutMix(num_classes=4)], ids=["mixup", "cutmix"])
def test_mixing_on_the_gpu(mix: augment.MixUp | augment.CutMix) -> None:
    images, targets = torch.rand(8, 3, 20, 24), torch.arange(8) % 4
    key = (1, 2, range(8))
    expected = mix(images, targets, key=key)
    compiled = torch.compile(lambda x, t: mix(x, t, key=key), fullgraph=True, backend="aot_eager")
    for call in (lambda: mix(images.cuda(), targets.cuda(), key=key), lambda: compiled(images.cuda(), targets.cuda())):
        for ours, cpu in zip(call(), expected, strict=True):
            assert ours.is_cuda
            torch.testing.assert_close(ours.cpu(), cpu)


def test_an_int8_network_moves_without_changing_a_bit(model: nn.Module, images: torch.Tensor) -> None:
    int8 = quantize(model, [images])
    expected = int8(images)
    assert torch.equal(int8.cuda()(images.cuda()).cpu(), expected)
    assert devices(int8) == {"cuda"}
    assert torch.equal(int8.cpu()(images), expected)


@pytest.mark.parametrize("network", ["resnet8", "mobilenetv2"])
def test_quantizing_on_the_gpu(network: str, images: torch.Tensor) -> None:
    model = create_model(network, num_classes=10, in_channels=3).eval()
    expected = quantize(model, [images])(images)
    int8 = quantize(model.cuda(), [images])
    assert devices(int8) == {"cuda"}
    # Calibration sees values that differ in their last bits: a few land on the next step.
    error = (int8(images.cuda()).cpu() - expected).square().mean() / expected.var()
    assert error < 1e-2
    assert profile(int8, images.cuda()).seconds > 0


def test_quantization_aware_training(model: nn.Module, images: torch.Tensor) -> None:
    aware = qat(model.cuda(), [images])
    optimizer = torch.optim.SGD(aware.parameters(), 0.01)
    aware.train()(images.cuda()).square().mean().backward()
    optimizer.step()
    found = aware.eval()(images.cuda())
    assert torch.equal(found, aware.convert()(images.cuda()))


def test_pruned_layers_learn(model: nn.Module, images: torch.Tensor) -> None:
    model = model.cuda()
    prune(model, PruneConfig(sparsity=0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(images.cuda()).logsumexp(1).sum().backward()
        optimizer.step()
    layers = [module for module in model.modules() if hasattr(module, "weight_mask")]
    assert layers
    for layer in layers:
        assert not layer.weight[~layer.weight_mask].any()
        assert layer.weight.isfinite().all()


def test_the_whole_recipe(tmp_path: Path) -> None:
    """Dense, pruned, quantization-aware and int8; the int8 network must still know the classes."""
    config = TrainConfig(  # a GPU would choose batches of 256; with the updates of a CPU seeds 0 and 1 end at 76.5 %
        epochs=3, warmup_epochs=0.5, prune_epochs=2, sparsity=0.8, qat_epochs=1, reference_epoch=False, memory=False,
        batch_size=128, device="cuda", output=str(tmp_path), experiment="gpu",
    )  # fmt: skip
    report = train(config)
    found = {row.stage: row.test_top1 for row in report.stages}
    assert found["int8"] > 0.75
    assert found["int8"] > found["pruned"] - 0.02
