"""Weight files of pruned networks: small, exact, and readable by every layer that holds such weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from imgopt_fast.compress import PruneConfig, load_weights, pack, prune, save_weights


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
