"""Channel pruning: the smaller network computes what the large one does when nobody reads the channels that went."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast.compress import PruneConfig, prune
from imgopt_fast.compress.prune import ChannelPruner
from imgopt_fast.models import create_model


class Zoo(nn.Module):
    """Chains, a residual path, a depthwise convolution, a gate, a concatenation, a scale per channel, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 5, 1), nn.SiLU(), nn.Conv2d(5, 24, 1))
        self.conv2 = nn.Conv2d(24, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 7, 1)
        self.attention = nn.Conv2d(13, 1, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(13 * 9, 11), nn.ReLU(), nn.Linear(11, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(torch.relu(self.bn1(self.conv1(x))))
        y = y * torch.sigmoid(self.gate(y))
        x = x + self.conv2(y) * self.scale
        x = nn.functional.max_pool2d(x, 2)
        x = torch.cat([self.left(x), self.right(x).relu()], dim=1)
        result: Tensor = self.head(x * torch.sigmoid(self.attention(x)))
        return result


class Wrapped(nn.Module):
    def __init__(self, body: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4)
        self.last = nn.Linear(8, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(self, x).mean((2, 3)))
        return result


def lived_in(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return model.eval()


def unread(model: nn.Module, pruner: ChannelPruner) -> nn.Module:
    """The original network, its readers blind to the channels that `pruner` removed."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for index in pruner.removed:
            for piece in pruner.groups[index].slices:
                if piece.axis == 1:
                    tensors[piece.tensor][:, piece.at] = 0
    return model


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("make", [Zoo, "resnet8", "mobilenetv2"], ids=["zoo", "resnet", "mobilenet"])
def test_smaller_network_is_exact(make: Any, scope: Any) -> None:
    side = 6 if make is Zoo else 32
    model = make() if make is Zoo else create_model(make, num_classes=5, in_channels=3)
    lived_in(model)
    x = torch.randn(3, 3, side, side)
    whole = copy.deepcopy(model)
    pruner = prune(model, PruneConfig(sparsity=0.4, structure="channels", scope=scope), example=x)
    assert isinstance(pruner, ChannelPruner)
    assert pruner.sparsity == pytest.approx(0.4, abs=0.06)
    with torch.no_grad():
        torch.testing.assert_close(model(x), unread(whole, pruner)(x), rtol=1e-4, atol=1e-5)
    count = sum(p.numel() for p in model.parameters())
    assert count < 0.6 * sum(p.numel() for p in whole.parameters())
    for line in pruner.report():
        assert line.shape == tuple(model.get_submodule(line.name).weight.shape) != line.before
    for module in model.modules():  # what a layer says of itself
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)


def test_the_smallest_channels_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        for channel, size in enumerate((3.0, 0.5, 2.0, 1.0)):
            model[0].weight[channel] = size  # type: ignore[index, operator]
    prune(model, PruneConfig(sparsity=0.5, structure="channels"), example=torch.randn(1, 3, 4, 4))
    assert model[0].weight[:, 0, 0, 0].tolist() == [3.0, 2.0]  # type: ignore[index, union-attr]
    assert model[2].weight.shape == (2, 2, 1, 1)
    assert repr(model[0]).startswith("Conv2d(3, 2")


def test_names_what_it_cannot_do_and_the_way_out() -> None:
    x = torch.randn(2, 3, 8, 8)
    shuffled = Wrapped(lambda m, x: m.second(nn.functional.channel_shuffle(m.first(x), 4)))
    with pytest.raises(ValueError, match=r"(?s)first: .*channel_shuffle.*exclude=\('first',"):
        prune(shuffled, PruneConfig(structure="channels"), example=x)
    assert shuffled.first.weight.shape[0] == 8
    prune(shuffled, PruneConfig(structure="channels", exclude=("first",)), example=x)
    with pytest.raises(ValueError, match=r"first: .*channel_shuffle|first: .*native_group_norm|first: .*group_norm"):
        prune(
            Wrapped(lambda m, x: nn.functional.group_norm(m.first(x), 2)), PruneConfig(structure="channels"), example=x
        )
    hard_coded = Wrapped(lambda m, x: m.first(x).reshape(-1, 8, 6, 6))
    with pytest.raises(ValueError, match="exclude"):
        prune(hard_coded, PruneConfig(structure="channels"), example=x)
    with pytest.raises(ValueError, match=r"^example: "):
        prune(Zoo(), PruneConfig(structure="channels"))
    masked = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    prune(masked, PruneConfig())
    with pytest.raises(ValueError, match=r"^model: .*masks"):
        prune(masked, PruneConfig(structure="channels"), example=torch.randn(1, 8, 4, 4))


def test_nothing_to_remove_is_an_error() -> None:
    for model, x in (
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 4, 1)), torch.randn(1, 3, 9)),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(1, 3, 4, 4)),
    ):
        with pytest.raises(ValueError, match=r"^model: no channel can be removed"):
            prune(model, PruneConfig(structure="channels"), example=x)


class Groups(nn.Module):
    """ResNeXt's block, one whose groups are called twice, and what has a number of its own for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16))
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 1), nn.InstanceNorm2d(16, affine=True), nn.PReLU(),
            nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 16, 1),
        )  # fmt: skip
        self.twice = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.last = nn.Conv2d(16, 32, 3, groups=8)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(x)
        x = self.twice(self.twice(x).relu()).relu()
        result: Tensor = self.head(self.last(x).mean((2, 3)))
        return result


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_groups_lose_the_same_channels_each(scope: Any) -> None:
    model, x = Groups().eval(), torch.randn(2, 3, 8, 8)
    whole = copy.deepcopy(model)
    pruner = prune(model, PruneConfig(sparsity=0.5, structure="channels", scope=scope), example=x)
    assert isinstance(pruner, ChannelPruner)
    groups = [module.groups for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert groups == [1, 1, 4, 1, 2, 8]
    if scope == "layer":
        assert [model.block[3].in_channels, model.block[3].out_channels] == [8, 12]
        assert model.stem[1].num_parameters == model.block[1].num_features == 8
    tensors = dict(whole.named_parameters())
    with torch.no_grad():
        for index in pruner.removed:
            for piece in pruner.groups[index].slices:
                if piece.axis == 0:
                    tensors[piece.tensor][piece.at] = 0  # what is made of nothing, without bias and scale, is nothing
        torch.testing.assert_close(model(x), whole(x), rtol=1e-4, atol=1e-5)


def train(model: nn.Module, optimizer: Any, pruner: ChannelPruner, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_gradual_removal_keeps_the_optimizer_and_resumes_to_the_bit(kind: str) -> None:
    def make() -> tuple[nn.Module, Any, ChannelPruner]:
        torch.manual_seed(1)
        model = Zoo()
        parameters = model.parameters()
        optimizer = torch.optim.SGD(parameters, 0.05, 0.9) if kind == "sgd" else torch.optim.Adam(parameters, 0.01)
        config = PruneConfig(sparsity=0.5, structure="channels", end_step=6, update_every=2)
        pruner = prune(model, config, optimizer, example=torch.randn(2, 3, 6, 6))
        assert isinstance(pruner, ChannelPruner)
        return model, optimizer, pruner

    model, optimizer, pruner = make()
    identities = [id(p) for p in model.parameters()]
    train(model, optimizer, pruner, 3, seed=0)
    half = pruner.sparsity
    assert 0 < half < 0.45
    states = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, pruner, 5, seed=1)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.06)
    assert identities == [id(p) for p in model.parameters()]
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            assert value.dim() == 0 or value.shape == parameter.shape

    again, again_optimizer, again_pruner = make()
    for part, state in zip((again_pruner, again, again_optimizer), states, strict=True):
        part.load_state_dict(state)
    assert again_pruner.sparsity == half
    train(again, again_optimizer, again_pruner, 5, seed=1)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"^state: "):
        again_pruner.load_state_dict(states[0])


def test_a_layer_keeps_a_channel_and_its_memory_format() -> None:
    model = Zoo().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pruner = prune(
        model, PruneConfig(sparsity=1.0, structure="channels", method="random"), example=torch.randn(2, 3, 6, 6)
    )
    assert min(min(p.shape) for p in model.parameters()) == 1
    assert pruner.sparsity < 1
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4)


def test_a_layer_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.shared(torch.relu(self.shared(self.first(x)))))
            return result

    model, x = Twice(), torch.randn(2, 3, 4, 4)
    whole = copy.deepcopy(model)
    pruner = prune(model, PruneConfig(sparsity=0.5, structure="channels"), example=x)
    assert isinstance(pruner, ChannelPruner)
    assert model.shared.weight.shape == (3, 3, 1, 1)
    torch.testing.assert_close(model(x), unread(whole, pruner)(x), rtol=1e-4, atol=1e-5)
