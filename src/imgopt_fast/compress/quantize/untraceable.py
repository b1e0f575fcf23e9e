"""What a user is told about a model that torch.export cannot follow: one error, which names the layer and the way out.

torch raises a page about its own debugging switches, prints the graph as far as it came and logs where to read on. The
line of the model's code is what helps; torch's error remains as the cause.
"""

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
CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")  # torch's own way into a module's forward


def untraceable(model: nn.Module, images: Tensor, refusal: Exception) -> ValueError:
    """The error for a `model` that raised `refusal` when it was traced with `images`."""
    name, line = _culprit(model, refusal)
    try:
        with torch.no_grad():
            model(images)
    except Exception as own:  # not the tracer's: whatever the model's code raises
        kind, shape = type(model).__name__, tuple(images.shape)
        return ValueError(f"calibration: {kind} does not take a batch of shape {shape}, in {name}: {own}")
    return ValueError(
        f"model: torch.export cannot trace {name}{line}: {str(refusal).strip().partition(chr(10))[0]}\n"
        "Make that line independent of the values of tensors (torch.where, torch.cond), or quantize the submodules "
        "that can be traced, one by one, and put them back."
    )


def _culprit(model: nn.Module, refusal: Exception) -> tuple[str, str]:
    """The innermost module of `model` in whose code an error was raised, and its line."""
    names = {module: name for name, module in model.named_modules()}
    found, line = model, ""
    for frame, number in traceback.walk_tb(refusal.__traceback__):
        owner = frame.f_locals.get("self")
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
