"""How an operation enters torch's dispatcher.

Each schema is defined once, here in Python, so that it exists without the compiled libraries; C++ only adds its
implementations. The plain-torch reference sits under every device that has no kernel of its own.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from imgopt_fast import _native

NAMESPACE = "imgopt_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # lives as long as the process


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fallback: str | None,
    fake: Callable[..., Any],
    tags: tuple[torch.Tag, ...] = (),
) -> torch._ops.OpOverload:
    """Define `schema` and register its plain-torch, Numba and fake implementations; returns the operation.

    `fallback` is `folder:function` of the Numba twin, e.g. "affine_warp:affine_warp" for the function of that name
    in ops/affine_warp/fallback.py; it is imported on first use, because importing Numba costs half a second. None: the
    reference serves the CPU.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if fallback is not None and _native.backend() == "numba":
        LIBRARY.impl(name, _lazy(fallback), "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def register_native(schema: str) -> Callable[..., Any]:
    """Define an operation that compiled kernels alone serve, in eager mode alone; returns what calls it.

    That is the function inside of the operation, whose own `__call__` adds 0.2 µs.
    """
    LIBRARY.define(schema)
    call: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), schema.partition("(")[0]).default._op
    return call


def has_kernel(name: str, key: str) -> bool:
    """Whether operation `name` has a compiled implementation for dispatch key `key`, e.g. "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def register_autograd(
    op: torch._ops.OpOverload, backward: Callable[..., tuple[Any, ...]], setup_context: Callable[..., None]
) -> None:
    """What torch.library.register_autograd does, for an operation of positional arguments without defaults.

    torch's own looks through the schema in every call to fill in defaults, 40 us of a call with 15 arguments.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, keyset = args
            output = below_autograd(keyset, *inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    def below_autograd(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiable.apply(*inputs, keyset)  # type: ignore[no-untyped-call]
        return below_autograd(keyset, *inputs)

    LIBRARY.impl(op._schema.name.partition("::")[2], kernel, "Autograd", with_keyset=True)


def register_autocast(op: torch._ops.OpOverload, adapt: Callable[..., tuple[Any, ...]]) -> None:
    """Under autocast, call `op` with the arguments that `adapt(dtype, *args)` returns.

    Registered for CPU and CUDA alike: an operation that knows only one of the two silently runs in float32 on the
    other.
    """
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, _device: str = device, _keyset: Any = keyset) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_keyset):
                return op(*adapt(torch.get_autocast_dtype(_device), *args))

        LIBRARY.impl(op._schema.name.partition("::")[2], kernel, key)


def _lazy(fallback: str) -> Callable[..., Any]:
    folder, _, function = fallback.partition(":")

    def call(*args: Any) -> Any:
        module = importlib.import_module(f"imgopt_fast.ops.{folder}.fallback")
        return getattr(module, function)(*args)

    return call
