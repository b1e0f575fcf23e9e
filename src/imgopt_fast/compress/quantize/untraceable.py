"""What a user is told about a model that torch.export cannot follow: one error, which names the layer and the way out.

torch raises a page about its own debugging switches, prints the graph as far as it came and logs where to read on. The
line of the model's code is what helps; torch's error remains as the cause.
"""

import inspect
import io
import linecache
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, nn

TALKATIVE = ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")  # loggers
WAY_OUT = (
    "Make that line independent of the values of tensors (torch.where, torch.cond), or quantize the submodules that "
    "can be traced, one by one, and put them back."
)
# What to do where torch says something else than that values decide.
WAYS_OUT = {
    "ScriptModule": "Quantize the module that it was scripted from.",
    "uninitialized parameter": "Call the model on a batch first, which tells lazy layers their shapes.",
    "is not a known type": "Return tensors, tuples, lists, dicts or named tuples, or register the type with "
    "torch.export.register_dataclass.",
}
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")  # torch's own way into a module's forward


def untraceable(model: nn.Module, images: Tensor, refusal: Exception) -> ValueError:
    """The error for a `model` that raised `refusal` when it was traced with `images`."""
    name, line = _culprit(model, refusal)
    try:
        with torch.no_grad():
            model(images)
    except Exception as own:  # not the tracer's: whatever the model's code raises
        kind, needed = type(model).__name__, _required(model)
        if len(needed) > 1:
            return ValueError(
                f"model: {kind} takes {len(needed)} inputs ({', '.join(needed)}), and quantize serves networks of one; "
                "quantize the submodules that take one, on what they are given, and put them back"
            )
        return ValueError(
            f"calibration: {kind} does not take images of shape {tuple(images.shape[1:])}, in {name}: {own}"
        )
    said = str(refusal).strip().partition("\n")[0]
    way = next((way for text, way in WAYS_OUT.items() if text in said), WAY_OUT)
    return ValueError(f"model: torch.export cannot trace {name}{line}: {said}\n{way}")


def _required(model: nn.Module) -> list[str]:
    """The arguments that `model` cannot be called without."""
    given = inspect.signature(model.forward).parameters.values()
    return [p.name for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _culprit(model: nn.Module, refusal: Exception) -> tuple[str, str]:
    """The innermost module of `model` in whose code an error was raised, and its line."""
    names = {module: name for name, module in model.named_modules()}
    found, line = model, ""
    for frame, number in traceback.walk_tb(refusal.__traceback__):
        owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))  # a method's first argument
        if isinstance(owner, nn.Module) and owner in names and frame.f_code.co_name not in CALLS:
            found, path = owner, frame.f_code.co_filename
            line = f" ({Path(path).name}:{number}: {linecache.getline(path, number).strip()})"
    return " ".join(filter(None, [names[found], type(found).__name__])), line


@contextmanager
def silent_failure() -> Iterator[None]:
    """Let what is printed to stderr come out only if no error is raised."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before, printed = [logger.disabled for logger in loggers], io.StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with redirect_stderr(printed):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
    sys.stderr.write(printed.getvalue())
