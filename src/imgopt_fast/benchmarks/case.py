"""A benchmark case: our call, those of the peers, the work that nobody can avoid, and the check before any timing.

A number for a wrong result is worse than none. Ours is therefore compared with PyTorch's reference before either is
timed, and a disagreement is an error; any other peer that disagrees is left out and the reason is kept.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from imgopt_fast import _native
from imgopt_fast.benchmarks.machine import PEER_FAILURES, Rates


class Disagreement(AssertionError):
    """Two programs that should compute the same do not."""


@dataclass(frozen=True)
class Agreement:
    """How near two results have to be: at most a share `outliers` of the values may differ by more than `bound`.

    `bound` is in the units of the result, or with `relative` a share of its largest magnitude.
    """

    bound: float
    outliers: float = 0.0
    relative: bool = False

    def check(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Raise Disagreement, with the figures, unless the results are near enough."""
        if ours.shape != theirs.shape:
            raise Disagreement(f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        if ours.numel() == 0:
            return
        difference = (ours.double() - theirs.double()).abs()
        bound = self.bound * (float(ours.double().abs().max()) if self.relative else 1.0)
        share = float((~(difference <= bound)).double().mean())  # a NaN is not within any bound
        if share > self.outliers:
            raise Disagreement(
                f"{share:.2%} of the values differ by more than {bound:.3g} (allowed: {self.outliers:.2%}), "
                f"the worst by {float(difference.max()):.3g}"
            )


EQUAL = Agreement(0.0)


@dataclass(frozen=True)
class Runner:
    """One contestant: `call` is what is timed; `result` makes its return value comparable with ours, untimed.

    `goal` is the least number of times that ours should be faster; `slack` are seconds that it may lose besides.
    """

    call: Callable[[], Any]
    agreement: Agreement = EQUAL
    result: Callable[[Any], torch.Tensor] = lambda value: value
    goal: float | None = None
    slack: float = 0.0


@dataclass(frozen=True)
class Work:
    """The least that a case has to do whatever the program; the count is derived beside each case."""

    flops: float = 0.0  # float32, a multiply-add is two
    int8_ops: float = 0.0  # likewise
    bytes_read: float = 0.0  # every input byte that matters, once
    bytes_written: float = 0.0  # every output byte, once

    def floor(self, rates: Rates, threads: int) -> float:
        """Seconds below which `threads` cores at these rates cannot go.

        Memory counts at the rate of the smallest level that holds everything; several cores are granted several
        times one core's rates, which is generous to memory, so the floor stays one.
        """
        copied = 2 * min(self.bytes_read, self.bytes_written)
        rest = self.bytes_read + self.bytes_written - copied
        read, copy = rates.memory(self.bytes_read + self.bytes_written)
        memory = copied / copy + rest / (read if self.bytes_read > self.bytes_written else copy)
        return max(self.flops / rates.fma, self.int8_ops / rates.int8_dot, memory) / threads


class Case(ABC):
    """One row of a benchmark. Making a case costs nothing; its inputs come into being with the first runner."""

    subject: ClassVar[str]
    reference: ClassVar[str] = "torch"  # the peer that ours must agree with
    name: str
    quick: bool
    threads: int | None = None  # a case about threads fixes their number; others take the caller's
    isa: str | None = None  # a case about an instruction set fixes it for ours
    note: str | None = None  # why a goal is missed, as measured; shown where one is

    @abstractmethod
    def ours(self) -> Runner: ...

    @abstractmethod
    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        """Builders by name, so that a peer that cannot be built costs only itself."""

    @abstractmethod
    def work(self) -> Work: ...

    def ideals(self, rates: Rates) -> Mapping[str, tuple[float, float | None]]:
        """Seconds of imagined peers, e.g. a dense product at nine tenths of the machine's rate, and the goals."""
        return {}

    @property
    def best_goal(self) -> float | None:
        """The least ratio against whichever peer is the fastest, where that is what counts."""
        return None

    @property
    def floor_goal(self) -> float | None:
        """The least share of the floor, where that is what counts."""
        return None

    def release(self) -> None:
        """Forget the inputs."""
        for name in [n for n in vars(self) if isinstance(getattr(type(self), n, None), cached_property)]:
            del self.__dict__[name]

    def __str__(self) -> str:
        return self.name


@dataclass
class Contest:
    """The contestants of a case, after they have been seen to agree."""

    case: Case
    ours: Runner
    peers: dict[str, Runner] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def assemble(case: Case, only: str | None = None) -> Contest:
    """Build ours and the peers (or the one named `only`), and check every peer against ours.

    Raises Disagreement when ours and the case's reference differ: there is nothing to time then.
    """
    ours = forced_isa(case.ours(), case.isa)
    contest = Contest(case, ours)
    expected = ours.result(ours.call())
    for name, build in case.peers().items():
        if only is not None and name != only:
            continue
        try:
            runner = quietly(build)
            runner.agreement.check(expected, runner.result(runner.call()))
        except Disagreement as error:
            if name == case.reference:
                raise Disagreement(f"{case.subject} {case.name}: ours and {name} disagree: {error}") from None
            contest.absent[name] = f"not timed, it disagrees: {error}"
        except PEER_FAILURES as error:
            if name == case.reference:
                raise
            contest.absent[name] = f"{type(error).__name__}: {first_line(error)}"
        else:
            contest.peers[name] = runner
    return contest


def quietly(build: Callable[[], Runner]) -> Runner:
    """What `build` returns; that a peer's interface is deprecated or a beta is not our reader's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


def forced_isa(runner: Runner, isa: str | None) -> Runner:
    """`runner` under instruction set `isa`; ValueError where the processor lacks it."""
    if isa is None:
        return runner

    def call() -> Any:
        with using_isa(isa):
            return runner.call()

    with using_isa(isa):
        pass
    return Runner(call, runner.agreement, runner.result, runner.goal)


def on_one_thread(runner: Runner, goal: float | None, agreement: Agreement = EQUAL) -> Runner:
    """`runner` on one of two threads: what the second one has to gain on."""

    def call() -> Any:
        torch.set_num_threads(1)
        try:
            return runner.call()
        finally:
            torch.set_num_threads(2)

    return Runner(call, agreement, runner.result, goal)


def using_isa(isa: str) -> ExitStack:
    """A context in which the kernels use `isa`."""
    before = _native.active_isa()
    _native.set_isa(isa)
    stack = ExitStack()
    if before is not None:
        stack.callback(_native.set_isa, before)
    return stack


def first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:160]
