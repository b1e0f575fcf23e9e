"""Weight files: safetensors, in which a tensor that is mostly zero is stored as a bit per element and its other values.

That is what makes a pruned network a smaller file: at 90 % sparsity 13 % of its dense bytes. The names say it:
`fc.weight` becomes `fc.weight.bits` (packed, most significant bit first) and `fc.weight.values`; the shapes are in the
file's metadata under "sparse", as JSON. A mask whose weight is stored that way is those very bits. What several names
share, as the weight of tied layers, is stored under the first; "shared" says of the others which that is.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from imgopt_fast.compress.prune import PruneConfig, prunable_layers, prune
from imgopt_fast.compress.prune.channels import describe_size

SIZE = 8  # bytes of the header's length at the start of a file, and what its tensors are aligned to
MASK = "_mask"  # of nn.MaskedLinear and nn.MaskedConv2d: the positions that count are the mask's, not the nonzeros


def save_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state_dict to `path`, each tensor in its smaller form; of a masked weight, the kept entries.

    Raises TypeError for what is no mapping of names to tensors, OSError when the file cannot be written.
    """
    _check(weights)
    shared = _shared(weights)
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in weights.items():
        if name in shared:
            continue
        pattern = weights.get(name + MASK)
        if pattern is None:
            pattern = (tensor != 0) | tensor.signbit()  # -0.0 is a value as well
        bits = torch.from_numpy(np.packbits(pattern.contiguous().cpu().numpy()))
        values = tensor[pattern]
        if tensor.dtype == torch.bool:
            values = values[:0]  # the bits say it all
        if bits.nbytes + values.nbytes < 0.9 * tensor.nbytes:
            stored[f"{name}.bits"], stored[f"{name}.values"] = bits, values.contiguous()
            shapes[name] = list(tensor.shape)
        else:
            stored[name] = tensor.clone(memory_format=torch.contiguous_format)  # of its own memory, as safetensors asks
    for name in [name for name in shapes if name + MASK in shapes]:
        for part in ("bits", "values"):
            del stored[f"{name}{MASK}.{part}"]
    # As bytes: safetensors' own writer reports a full disk as something else than an OSError.
    metadata = {"format": "pt", "sparse": json.dumps(shapes)} | ({"shared": json.dumps(shared)} if shared else {})
    file = save(stored, metadata=metadata)
    header, tensors = _ordered_header(file)
    with Path(path).open("wb") as output:
        output.write(header)
        output.write(tensors)


def _check(weights: Mapping[str, Tensor]) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a state_dict, got {type(weights).__name__}")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weights: expected tensors, got {type(tensor).__name__} as {name!r}")


def _shared(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one of these, and the first name of that one."""
    first: dict[tuple[Any, ...], str] = {}
    places = {
        name: (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        for name, tensor in weights.items()
        if tensor.numel()
    }
    return {name: found for name, place in places.items() if (found := first.setdefault(place, name)) != name}


def _ordered_header(file: bytes) -> tuple[bytes, memoryview]:
    """The header with its metadata sorted, whose order safetensors draws at random, and the rest: the same weights are
    the same bytes."""
    begin = SIZE + int.from_bytes(file[:SIZE], "little")
    header = json.loads(file[SIZE:begin])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % SIZE)
    return len(text).to_bytes(SIZE, "little") + text, memoryview(file)[begin:]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in the file `path`; ValueError when it is not a whole safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            shapes, shared = (json.loads((file.metadata() or {}).get(key, "{}")) for key in ("sparse", "shared"))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a weight file: {error}") from error
    weights = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in shapes}
    for name, shape in shapes.items():
        held = name if f"{name}.bits" in stored else name.removesuffix(MASK)
        bits, values = stored[f"{held}.bits"], stored[f"{held}.values"]
        pattern = torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool().reshape(shape)
        if held != name or values.dtype == torch.bool:
            weights[name] = pattern
        else:
            weights[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter_(pattern, values)
    return weights | {name: weights[first] for name, first in shared.items()}


def load_into(model: nn.Module, path: str | Path) -> None:
    """Give a network that was made anew the weights of the file `path`, and first its structure.

    Its layers take a mask where the file has one, and shrink where channels had been removed. On the meta device its
    tensors become those of the file. Raises ValueError, naming the tensor, where the file is of another network; the
    model is then left half changed.
    """
    stored = load_weights(path)
    dense = [name for name, _ in prunable_layers(model) if f"{name}.weight{MASK}" not in stored]
    if len(dense) < len(list(prunable_layers(model))):
        prune(model, PruneConfig(sparsity=0, exclude=tuple(dense)))
    own = model.state_dict()
    if different := sorted(own.keys() ^ stored.keys()):
        where = "the file" if different[0] in own else "the model"
        raise ValueError(f"{path}: of another network: {where} has no {different[0]}; build the one that was saved")
    for name, tensor in own.items():
        if stored[name].shape != tensor.shape:
            _shrink(model, name, stored[name], path)
    model.load_state_dict(stored, assign=any(tensor.is_meta for tensor in own.values()))


def _shrink(model: nn.Module, name: str, like: Tensor, path: str | Path) -> None:
    """Bring a parameter or buffer to the shape of `like`, and the numbers of its layer with it."""
    folder, _, attribute = name.rpartition(".")
    layer = model.get_submodule(folder)
    present = getattr(layer, attribute)
    if present.ndim != like.ndim or any(new > old for new, old in zip(like.shape, present.shape, strict=True)):
        raise ValueError(
            f"{path}: {name} has shape {tuple(like.shape)} in the file and {tuple(present.shape)} in the model; build "
            "the network with the arguments of the one that was saved"
        )
    smaller = present.data[tuple(slice(size) for size in like.shape)].clone()
    if isinstance(present, nn.Parameter):
        present.data = smaller
    else:
        setattr(layer, attribute, smaller)
    describe_size(layer)
