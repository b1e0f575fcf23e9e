"""Where an int8 network spends its time and memory."""

import operator
import time
from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from imgopt_fast.compress.quantize.model import Int8Model
from imgopt_fast.nn import Int8Segment, Step

T = TypeVar("T")
REPEATS = 5  # the fastest of so many runs: what disturbs a run only ever adds time


class StepProfile(NamedTuple):
    """One int8 step or float operation; `output_bytes` is the size of what it makes."""

    name: str
    operation: str
    dtype: str
    seconds: float
    share: float
    output_bytes: int


class NetworkProfile(NamedTuple):
    """`seconds` is a whole call; the steps, measured one by one, add up to more, so `share` is of their sum."""

    steps: list[StepProfile]
    seconds: float
    batch: int

    def __str__(self) -> str:
        width = max(len(step.name) for step in self.steps)
        lines = [f"{'step':{width}}  {'operation':18} {'runs in':8} {'us':>9} {'share':>6} {'KiB made':>9}"]
        for step in self.steps:
            lines.append(
                f"{step.name:{width}}  {step.operation:18} {step.dtype:8} {1e6 * step.seconds:9.1f} {step.share:6.1%} "
                f"{step.output_bytes / 1024:9.1f}"
            )
        return "\n".join([*lines, f"whole call: {1e3 * self.seconds:.3f} ms at batch {self.batch}"])


@torch.no_grad()
def profile(model: Int8Model, images: Tensor) -> NetworkProfile:
    """Time every int8 step and float operation of `model` on `images`, each alone and as the fastest of five runs."""
    rows: list[tuple[str, str, str, float, int]] = []

    def run_step(step: Step, compute: Callable[[], Tensor]) -> Tensor:
        seconds, result = _fastest(compute)
        rows.append((step.name, step.kind, "int8", seconds, result.nbytes))
        return result

    class Watch(Interpreter):
        def run_node(self, n: Node) -> Any:
            if n.op not in ("call_function", "call_module"):
                return super().run_node(n)
            if n.op == "call_function":
                seconds, result = _fastest(partial(super().run_node, n))
                if isinstance(result, Tensor) and n.target is not operator.getitem:
                    rows.append((n.name, str(n.target), str(result.dtype)[6:], seconds, result.nbytes))
                return result
            segment = model.network.get_submodule(str(n.target))
            assert isinstance(segment, Int8Segment)
            segment.run_stepwise([self.env[source] for source in n.args if isinstance(source, Node)], run_step)
            return super().run_node(n)

    Watch(model.network).run(images)
    total = sum(row[3] for row in rows)
    seconds, _ = _fastest(lambda: model(images))
    steps = [StepProfile(*row[:4], row[3] / total, row[4]) for row in rows]
    return NetworkProfile(steps, seconds, len(images))


def _fastest(compute: Callable[[], T]) -> tuple[float, T]:
    seconds, result = inf, None
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = compute()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, cast(T, result)
