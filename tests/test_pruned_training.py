"""Pruned networks in training: odd masks, masks that change midway, autocast, averages, two processes, data."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imgopt_fast.compress import MaskedSGD, PruneConfig, prune
from imgopt_fast.data import load_dataset
from imgopt_fast.nn import MaskedConv2d, MaskedLinear
from imgopt_fast.ops.masked_matmul import mask_layout, masked_matmul

MASKS = ["empty", "full", "one row", "one column", "diagonal", "one entry"]


def mask_of(shape: torch.Size, kind: str) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if kind == "full":
        return ~mask
    if kind == "one row":
        mask[len(mask) // 2] = True
    elif kind == "one column":
        mask[:, shape[1] // 2] = True
    elif kind == "diagonal":
        for i in range(min(shape[:2])):
            mask[i, i] = True
    elif kind == "one entry":
        mask.view(-1)[mask.numel() // 3] = True
    return mask


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 8, 3, stride=2, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


def step(model: nn.Module, optimizer: Any, pruner: Any, seed: int, **autocast: Any) -> None:
    x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    pruner.step()


def pruned_are_zero(model: nn.Module) -> bool:
    return all(
        not m.weight[~m.weight_mask].any() for m in model.modules() if isinstance(m, (MaskedLinear, MaskedConv2d))
    )


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("make", [lambda: MaskedLinear(13, 9), lambda: MaskedConv2d(7, 9, 3, padding=1)])
def test_adversarial_masks_train(make: Any, kind: str) -> None:
    layer = make()
    layer.set_mask(mask_of(layer.weight.shape, kind))
    x = torch.randn(3, 13) if isinstance(layer, MaskedLinear) else torch.randn(2, 7, 5, 4)
    weight = layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    optimizer = MaskedSGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, model=layer)
    twin_optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        for chosen in (optimizer, twin_optimizer):
            chosen.zero_grad()
        layer(x).square().mean().backward()
        kept = torch.where(layer.weight_mask, weight, 0)
        function = nn.functional.linear if x.dim() == 2 else nn.functional.conv2d
        options = {} if x.dim() == 2 else {"padding": 1}
        function(x, kept, bias, **options).square().mean().backward()
        optimizer.step()
        twin_optimizer.step()
    torch.testing.assert_close(layer.weight, weight * layer.weight_mask, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.bias, bias, rtol=1e-4, atol=1e-6)
    assert pruned_are_zero(layer)


@pytest.mark.parametrize("shape", [(4, 20), (2, 3, 20)])
def test_a_mask_that_changes_before_the_backward(shape: tuple[int, ...]) -> None:
    """The gradient is that of the forward that was computed."""
    layer = MaskedLinear(20, 6)
    first = torch.rand(6, 20) < 0.4
    layer.set_mask(first)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(
        nn.functional.linear(x, layer.weight * first, layer.bias).square().sum(), [x, layer.weight]
    )
    output = layer(x).square().sum()
    layer.weight_mask.logical_not_()  # not through set_mask, which also changes the weight: autograd refuses that
    got = torch.autograd.grad(output, [x, layer.weight])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    output = layer(x).sum()
    layer.set_mask(first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_non_contiguous_and_transposed_inputs() -> None:
    mask = torch.rand(6, 20) < 0.4
    weight, wide = torch.randn(6, 20), torch.randn(20, 8)
    for x in (wide.t(), torch.randn(4, 40)[:, ::2], torch.randn(1, 20).expand(5, 20)):
        expected = x @ (weight * mask).t()
        torch.testing.assert_close(masked_matmul(x, weight, mask_layout(mask)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "ours"])
def test_autocast(kind: str) -> None:
    model, twin = network(), network()
    config = PruneConfig(sparsity=0.6, end_step=3)
    states = []
    for each, autocast in ((model, {"dtype": torch.bfloat16}), (twin, {})):
        optimizer: Any = torch.optim.SGD(each.parameters(), 0.05, 0.9)
        if kind == "ours":
            optimizer = MaskedSGD(each.parameters(), 0.05, 0.9, model=each)
        pruner = prune(each, config, optimizer)
        for seed in range(5):
            step(each, optimizer, pruner, seed, **autocast)
        assert pruned_are_zero(each)
        states.append(torch.cat([p.detach().flatten() for p in each.parameters()]))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(states[0], states[1], rtol=0.05, atol=0.05)


def test_inference_follows_weights_and_masks() -> None:
    """In evaluation mode the packed weight serves; whatever changes it must be seen."""
    model = network().eval()
    prune(model, PruneConfig(sparsity=0.5))
    x = torch.randn(2, 6, 8, 8)

    def check() -> None:
        with torch.no_grad():
            packed = model(x)
        torch.testing.assert_close(packed, model(x).detach(), rtol=1e-4, atol=1e-5)

    check()
    with torch.no_grad():
        model[6].weight.normal_()  # type: ignore[union-attr, operator]
    check()
    model[3].set_mask(~model[3].weight_mask)  # type: ignore[union-attr, operator, arg-type]
    check()
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    check()
    model.train().eval()
    model[0].weight.data.mul_(2.0)  # type: ignore[union-attr, operator]
    model.eval()
    check()
    with torch.inference_mode():
        packed = model(x)
    torch.testing.assert_close(packed.clone(), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_average_has_the_masks_of_its_model() -> None:
    """Buffers are copied, which is AveragedModel's default; weights that were pruned on the way are absent from it."""
    model = network()
    optimizer = MaskedSGD(model.parameters(), 0.05, 0.9, model=model)
    pruner = prune(model, PruneConfig(sparsity=0.8, end_step=4), optimizer)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in range(8):
        step(model, optimizer, pruner, seed)
        average.update_parameters(model)
    twin = copy.deepcopy(average)
    for each in (average, twin):
        for ours, theirs in zip(each.module.modules(), model.modules(), strict=True):
            if isinstance(theirs, (MaskedLinear, MaskedConv2d)):
                assert isinstance(ours, (MaskedLinear, MaskedConv2d))
                assert torch.equal(ours.weight_mask, theirs.weight_mask)
    x = torch.randn(2, 6, 8, 8)
    bare = copy.deepcopy(average)
    for module in bare.modules():
        if isinstance(module, (MaskedLinear, MaskedConv2d)):
            module.set_mask(module.weight_mask)  # zeroes what is off it
    with torch.no_grad():
        expected = bare.eval()(x)
        for each in (average, twin):
            torch.testing.assert_close(each.eval()(x), expected)


REGROWING: tuple[Any, ...] = (None, "gradient")


def plain_network() -> nn.Sequential:
    model = network()
    model[1] = nn.Identity()  # batch statistics of halves are not those of the whole
    return model


def train_distributed(rank: int, world: int, folder: Path) -> None:
    """Each process trains on its share of every batch and leaves its networks behind."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    states = []
    for regrow in REGROWING:
        model = plain_network()
        optimizer = MaskedSGD(model.parameters(), 0.05, 0.9, weight_decay=0.01, model=model)
        pruner = prune(model, PruneConfig(sparsity=0.7, end_step=6, update_every=2, regrow=regrow), optimizer)
        parallel = DistributedDataParallel(model)
        for seed in range(8):
            x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            parallel(x.chunk(world)[rank]).square().mean().backward()
            optimizer.step()
            pruner.step()
        assert pruned_are_zero(model)
        states.append(model.state_dict())
    torch.save(states, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_one_network(tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.multiprocessing.spawn(train_distributed, (2, tmp_path), nprocs=2)  # type: ignore[no-untyped-call]
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for regrow, first, second in zip(REGROWING, *both, strict=True):
        model = plain_network()
        optimizer = MaskedSGD(model.parameters(), 0.05, 0.9, weight_decay=0.01, model=model)
        pruner = prune(model, PruneConfig(sparsity=0.7, end_step=6, update_every=2, regrow=regrow), optimizer)
        for seed in range(8):
            step(model, optimizer, pruner, seed)
        for name, value in model.state_dict().items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(value, first[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("regrow", [None, "gradient"])
def test_a_network_pruned_to_ten_percent_still_knows_fashion(regrow: Any) -> None:
    """Gradual and dynamic pruning of a small network on images of the embedded Fashion-MNIST, a few seconds."""
    dataset = load_dataset(None, image_size=None, validation=0.2)
    images, labels = dataset.train.images.float() / 255 - 0.3, dataset.train.labels
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 128),
        nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = MaskedSGD(model.parameters(), lr=0.05, momentum=0.9, model=model)
    config = PruneConfig(sparsity=0.9, start_step=60, end_step=200, update_every=10, regrow=regrow, exclude=("0",))
    pruner = prune(model, config, optimizer)

    def accuracy() -> float:
        with torch.no_grad():
            found = model.eval()(dataset.validation.images.float() / 255 - 0.3).argmax(1)
        model.train()
        return float((found == dataset.validation.labels).float().mean())

    generator = torch.Generator().manual_seed(0)
    dense = 0.0
    for at in range(300):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        pruner.step()
        if at == 58:
            dense = accuracy()
    assert pruner.sparsity == pytest.approx(0.9, abs=0.005)
    assert pruned_are_zero(model)
    assert accuracy() > max(dense, 0.7), f"dense at step 59: {dense}"
