"""Networks that begin with what another one knows.

The weights of a checkpoint are taken where name and shape agree; the rows of the last layer are taken class by class,
for the classes that carry the same name. Then the whole network learns (`finetune`, with `--layer-decay` the lower
layers less), or only its last layer does: behind a frozen network that sees augmented images (`frozen`), or on features
that are computed once (`features`), in seconds. With `--unfreeze` the rest follows when the last layer has learned, so
that the gradients of a random one do not undo what the body knows (Kumar et al. 2022).
"""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from imgopt_fast.compress import load_weights
from imgopt_fast.nn import MaskedLinear

logger = logging.getLogger("imgopt_fast")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file or in a file that torch.save made. Raises ValueError."""
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path}: not a file of weights") from error
    stored = stored if isinstance(stored, dict) else {}
    for key in ("state", "state_dict", "model"):  # as training scripts wrap them, and our own checkpoint.pt, twice
        if isinstance(stored.get(key), dict):
            stored = stored[key]
    weights = {name.removeprefix("module."): t for name, t in stored.items() if isinstance(t, Tensor)}
    if not weights:
        raise ValueError(f"{path}: not a file of weights")
    return weights


def transfer_weights(
    model: nn.Module,
    weights: dict[str, Tensor],
    class_names: Sequence[str],
    known: Sequence[str] | None,
    what: str = "the two networks",
) -> list[str]:
    """Copy what `weights` has for `model`; returns the names of what keeps its initial values.

    `known` are the class names of the last layer's rows in `weights`, None where nobody knows them: it is then taken
    whole, if it fits. Raises ValueError, with `what` was compared, when fewer than half of the tensors below the last
    layer fit, or nothing at all does.
    """
    state, head, left = model.state_dict(), head_name(model), list[str]()
    _check_alike(state, weights, head, what)
    for name, tensor in state.items():
        found = weights.get(name)
        if found is not None and found.shape == tensor.shape and not (known and name.rpartition(".")[0] == head):
            tensor.copy_(found)
        elif found is not None and known and name.rpartition(".")[0] == head and found.shape[1:] == tensor.shape[1:]:
            for row, class_name in enumerate(class_names):
                if class_name in known:
                    tensor[row] = found[list(known).index(class_name)]
            left += [f"{name}[{c}]" for c in class_names if c not in known]
        else:
            left.append(name)
    return left


def _check_alike(state: dict[str, Tensor], weights: dict[str, Tensor], head: str, what: str) -> None:
    body = [name for name in state if name.rpartition(".")[0] != head] or list(state)  # a last layer may be all
    shared = sum(name in weights and weights[name].shape == state[name].shape for name in body)
    if 2 * shared >= len(body):
        return
    int8 = any(name.endswith("weight_int8") for name in weights)
    hint = "it holds an int8 network: take the run folder, or the file of a stage before"
    raise ValueError(
        f"pretrained: {what} share {shared} of {len(body)} weights by name and shape; "
        + (hint if int8 else "expected weights of the same network")
    )


def head_name(model: nn.Module) -> str:
    """Of the last linear layer; "" where there is none."""
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, MaskedLinear))]
    return names[-1] if names else ""


def freeze_body(model: nn.Module) -> None:
    """Everything but the last linear layer keeps its weights, and by `training_mode` its statistics."""
    head = head_name(model)
    if not head:
        raise ValueError("transfer: expected a network with a linear layer at its end")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.get_submodule(head).parameters():
        parameter.requires_grad_(True)


def thaw(model: nn.Module) -> None:
    """Everything learns again."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def training_mode(model: nn.Module, *, keep_statistics: bool = False) -> None:
    """model.train(), but modules whose parameters are all frozen, batch norms as well, stay as they are.

    `keep_statistics`: all batch norms normalize by the statistics that they have.
    """
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        frozen = own and not any(p.requires_grad for p in own)
        if frozen or (keep_statistics and isinstance(module, _BatchNorm)):
            module.eval()
