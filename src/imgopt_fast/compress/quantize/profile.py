"""Where an int8 network spends its time and memory."""

import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from imgopt_fast.compress.quantize.model import Int8Model
from imgopt_fast.compress.quantize.report import float_operations
from imgopt_fast.nn import Int8Segment, Step

T = TypeVar("T")
REPEATS = 5  # the fastest of so many runs: what disturbs a run only ever adds time


class StepProfile(NamedTuple):
    """One int8 step or float operation; `live_bytes` are the activations in memory while it runs, its own included."""

    name: str
    operation: str
    dtype: str
    seconds: float
    share: float
    live_bytes: int


class NetworkProfile(NamedTuple):
    """`seconds` is a whole call; the steps, measured one by one, add up to more, so `share` is of their sum."""

    steps: list[StepProfile]
    seconds: float
    batch: int

    @property
    def peak_bytes(self) -> int:
        """Most activations in memory at one time, the network's input included, its weights not."""
        return max(step.live_bytes for step in self.steps)

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        lines = [f"{'step':{width}}  {'operation':18} {'runs in':8} {'us':>9} {'share':>6} {'KiB live':>9}"]
        for step in self.steps:
            lines.append(
                f"{step.name:{width}}  {step.operation:18} {step.dtype:8} {1e6 * step.seconds:9.1f} {step.share:6.1%} "
                f"{step.live_bytes / 1024:9.1f}"
            )
        peak = f"{self.peak_bytes / 1024:.1f} KiB of activations"
        return "\n".join([*lines, f"whole call: {1e3 * self.seconds:.3f} ms at batch {self.batch}, {peak}"])


@torch.no_grad()
def profile(model: Int8Model, images: Tensor) -> NetworkProfile:
    """Time every int8 step and float operation of `model` on `images`, each alone and as the fastest of five runs.

    Raises TypeError when `model` is not what `quantize` returned.
    """
    if not isinstance(model, Int8Model):
        raise TypeError(f"model: expected an Int8Model, as quantize returns, got {type(model).__name__}")
    names = dict(zip(float_operations(model.network), model.report.floats, strict=True))
    rows: list[tuple[str, str, str, float, int]] = []

    class Watch(Interpreter):
        def held(self) -> int:
            """Bytes of the values that the graph still holds; views of one memory count once."""
            tensors = [leaf for leaf in pytree.tree_leaves(list(self.env.values())) if isinstance(leaf, Tensor)]
            return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())

        def run_step(self, step: Step, compute: Callable[[], Tensor], held: int) -> Tensor:
            seconds, result = _fastest(compute)
            rows.append((step.name, step.kind, "int8", seconds, self.held() + held + result.nbytes))
            return result

        def run_node(self, n: Node) -> Any:
            if n.op not in ("call_function", "call_module"):
                return super().run_node(n)
            if n.op == "call_function":
                seconds, result = _fastest(partial(super().run_node, n))
                made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
                if made and n in names:
                    operation = str(n.target).removeprefix("aten.").removesuffix(".default")
                    held = self.held() + sum(tensor.nbytes for tensor in made)
                    rows.append((names[n], operation, str(made[0].dtype)[6:], seconds, held))
                return result
            segment = model.network.get_submodule(str(n.target))
            assert isinstance(segment, Int8Segment)
            segment.run_stepwise([self.env[source] for source in n.args if isinstance(source, Node)], self.run_step)
            return super().run_node(n)

    Watch(model.network).run(images.float())
    total = sum(row[3] for row in rows)
    seconds, _ = _fastest(lambda: model(images))
    steps = [StepProfile(*row[:4], row[3] / total, row[4]) for row in rows]
    return NetworkProfile(steps, seconds, len(images))


def _fastest(compute: Callable[[], T]) -> tuple[float, T]:
    seconds, result = inf, None
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the call returns before the work is done
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, cast(T, result)
