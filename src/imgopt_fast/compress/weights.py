"""Weight files: safetensors, in which a tensor that is mostly zero is stored as a bit per element and its other values.

That is what makes a pruned network a smaller file: at 90 % sparsity 13 % of its dense bytes. The names say it:
`fc.weight` becomes `fc.weight.bits` (packed, most significant bit first) and `fc.weight.values`; the shapes are in the
file's metadata under "sparse", as JSON. A mask whose weight is stored that way is those very bits.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

MASK = "_mask"  # of nn.MaskedLinear and nn.MaskedConv2d: the positions that count are the mask's, not the nonzeros


def save_weights(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state_dict to `path`, each tensor in its smaller form; of a masked weight, the kept entries.

    Raises OSError when the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in weights.items():
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
            stored[name] = tensor.contiguous()
    for name in [name for name in shapes if name + MASK in shapes]:
        for part in ("bits", "values"):
            del stored[f"{name}{MASK}.{part}"]
    # As bytes: safetensors' own writer reports a full disk as something else than an OSError.
    Path(path).write_bytes(save(stored, metadata={"format": "pt", "sparse": json.dumps(shapes)}))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state_dict in the file `path`; ValueError when it is not a whole safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            shapes = json.loads((file.metadata() or {}).get("sparse", "{}"))
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
    return weights
