"""Puts a layer in the place of another, wherever a network holds it."""

from torch import nn

# Of every module: what to call around its forward and backward.
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name and ("forward" in name or "backward" in name))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` under every name that `old` has in `model`."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)
        elif isinstance(module, nn.TransformerEncoderLayer) and any(child is old for child in module.children()):
            module.activation_relu_or_gelu = 0  # or its fused inference reads the weights and calls no layer
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # for that inference only


def take_hooks(new: nn.Module, old: nn.Module) -> None:
    """What was called around the forward and backward of `old` is for `new`; handles go on to remove it."""
    for name in HOOKS:
        setattr(new, name, getattr(old, name))
