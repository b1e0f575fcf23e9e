"""Weight files of pruned networks: small, exact, and readable by every layer that holds such weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast.compress import PruneConfig, load_into, load_weights, pack, prune, save_weights


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 100),
    )  # fmt: skip


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.contiguous().numpy().tobytes() == other[name].contiguous().numpy().tobytes()
        for name, value in one.items()
    )


@pytest.mark.parametrize(
    ("structure", "sparsity", "share"),
    [("unstructured", 0.9, 0.15), ("4x1", 0.9, 0.15), ("16x16", 0.9, 0.15), ("2:4", 0.5, 0.55), ("1:4", 0.5, 0.3)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pruned_network_is_a_small_file_and_comes_back_to_the_bit(
    tmp_path: Path, structure: str, sparsity: float, share: float, memory_format: torch.memory_format
) -> None:
    model = network().to(memory_format=memory_format)  # type: ignore[call-overload]
    dense = sum(value.nbytes for value in model.state_dict().values())
    pruner = prune(model, PruneConfig(sparsity=sparsity, structure=structure))
    kept = pruner.layers["0"].weight_mask.nonzero()[0].tolist()
    with torch.no_grad():
        pruner.layers["0"].weight[tuple(kept)] = 0.0  # a kept weight may be zero
    path = tmp_path / "pruned.safetensors"
    save_weights(model.state_dict(), path)
    assert path.stat().st_size < share * dense + 3000  # names, shapes, batch norm
    loaded = load_weights(path)
    assert same_bits(loaded, {k: v.contiguous() for k, v in model.state_dict().items()})

    x = torch.randn(2, 32, 6, 6)
    again, packed = network(), network()
    for other in (again, packed):
        prune(other, PruneConfig(sparsity=0))
    pack(packed)
    with torch.no_grad():
        expected = model.eval()(x)
        for other in (again, packed):
            other.load_state_dict(loaded)
            torch.testing.assert_close(other.eval()(x), expected, rtol=1e-5, atol=1e-6)
    save_weights(packed.state_dict(), tmp_path / "packed.safetensors")
    assert same_bits(load_weights(tmp_path / "packed.safetensors"), loaded)


def test_the_same_weights_are_the_same_file(tmp_path: Path) -> None:
    weights = {"ä.weight": torch.randn(7, 5), "b": torch.zeros(90), "c": torch.tensor(3)}
    files = set()
    for i in range(16):
        save_weights(weights, tmp_path / f"{i}.safetensors")
        files.add((tmp_path / f"{i}.safetensors").read_bytes())
    (file,) = files
    assert int.from_bytes(file[:8], "little") % 8 == 0
    loaded = load_weights(tmp_path / "0.safetensors")
    assert all(loaded[name].equal(tensor) for name, tensor in weights.items())


def test_values_that_compare_equal_to_zero_and_odd_dtypes(tmp_path: Path) -> None:
    sparse = torch.zeros(300)
    sparse[::50] = torch.tensor([-0.0, torch.nan, torch.inf, 1e-45, -1.0, 2.0])
    weights = {
        "float": sparse, "bfloat16": sparse.to(torch.bfloat16).view(10, 30), "double": sparse.double(),
        "long": torch.arange(200) // 190, "bool": torch.zeros(77, dtype=torch.bool), "scalar": torch.tensor(0.0),
        "alone_mask": torch.zeros(640, dtype=torch.bool), "uint8": torch.zeros(100, dtype=torch.uint8),
    }  # fmt: skip
    save_weights(weights, tmp_path / "file.safetensors")
    loaded = load_weights(tmp_path / "file.safetensors")
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name].contiguous().view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), name


def test_a_dense_weight_with_a_mask(tmp_path: Path) -> None:
    model = network()
    prune(model, PruneConfig(sparsity=0.02))
    save_weights(model.state_dict(), tmp_path / "file.safetensors")
    assert same_bits(load_weights(tmp_path / "file.safetensors"), model.state_dict())


def test_a_new_network_takes_the_file(tmp_path: Path) -> None:
    """As docs/prune.md says, and with the path as text."""
    pruned, fresh = (nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 4)) for _ in range(2))
    prune(pruned, PruneConfig(sparsity=0.9))
    save_weights(pruned.state_dict(), str(tmp_path / "pruned.safetensors"))
    prune(fresh, PruneConfig(sparsity=0.0))
    fresh.load_state_dict(load_weights(str(tmp_path / "pruned.safetensors")))
    x = torch.randn(3, 20)
    assert torch.equal(fresh(x), pruned(x))


def small(channels: int = 16, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


def test_what_is_shared_is_stored_once(tmp_path: Path) -> None:
    dense, path = nn.Linear(40, 40), tmp_path / "shared.safetensors"
    model = nn.Sequential(dense, nn.ReLU(), dense)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for change, share in ((lambda: None, 1.0), (lambda: prune(model, PruneConfig(sparsity=0.9)), 0.2)):
        change()
        save_weights(model.state_dict(), path)
        assert path.stat().st_size < share * 4 * (1600 + 40) + 1000
        loaded = load_weights(path)
        assert same_bits(loaded, model.state_dict())
        assert loaded["0.weight"] is loaded["2.weight"]
    again = nn.Linear(40, 40)
    twice = nn.Sequential(again, nn.ReLU(), again)
    load_into(twice, path)
    assert twice[0] is twice[2]
    assert same_bits(twice.state_dict(), model.state_dict())
    whole = torch.randn(100)
    views = {"first": whole[:50], "last": whole[50:], "whole": whole, "same": whole, "square": whole.view(10, 10)}
    save_weights(views, path)
    assert same_bits(load_weights(path), views)


def test_refuses_what_is_no_state_dict(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^weights: expected a state_dict, got Sequential"):
        save_weights(network(), tmp_path / "file")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^weights: expected tensors, got dict as 'state'"):
        save_weights(torch.optim.SGD(network().parameters()).state_dict(), tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pruned", [False, True])
def test_a_network_without_memory_takes_the_tensors_of_a_file(tmp_path: Path, pruned: bool) -> None:
    model, path = network(), tmp_path / "file.safetensors"
    if pruned:
        prune(model, PruneConfig(sparsity=0.9))
    save_weights(model.state_dict(), path)
    with torch.device("meta"):
        empty = network()
    load_into(empty, path)
    assert same_bits(empty.state_dict(), model.state_dict())
    x = torch.randn(2, 32, 6, 6)
    for mode in (True, False):
        assert torch.equal(empty.train(mode)(x), model.train(mode)(x))
    assert all(parameter.requires_grad for parameter in empty.parameters())


@pytest.mark.parametrize("also_masked", [False, True])
def test_a_fresh_network_takes_the_structure_of_a_file(tmp_path: Path, also_masked: bool) -> None:
    model, images, path = small(), torch.randn(4, 3, 8, 8), tmp_path / "small.safetensors"
    prune(model, PruneConfig(sparsity=0.5, structure="channels"), example=images)
    if also_masked:
        prune(model, PruneConfig(sparsity=0.3, exclude=("4",)))
    save_weights(model.state_dict(), path)
    again = small()
    load_into(again, path)
    assert same_bits(again.state_dict(), model.state_dict())
    assert repr(again) == repr(model), "the layers show their sizes, and groups"
    assert sum(value.numel() for value in again.parameters()) < 0.6 * sum(
        value.numel() for value in small().parameters()
    )
    assert torch.equal(again.eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (lambda: small(channels=8), r"0.weight has shape \(16, 3, 3, 3\) in the file and \(8, 3, 3, 3\) in the model"),
        (lambda: nn.Sequential(*list(small())[:4]), "the model has no 4.bias"),
        (lambda: nn.Sequential(*small(), nn.Linear(10, 2)), "the file has no 9.bias"),
    ],
)
def test_the_file_of_another_network_is_named_as_such(tmp_path: Path, other: Any, match: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(small().state_dict(), path)
    with pytest.raises(ValueError, match=match):
        load_into(other(), path)
