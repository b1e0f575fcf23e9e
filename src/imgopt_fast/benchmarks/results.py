"""Runs a case and keeps what came out, as data that JSON can hold and as text that people can read."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from imgopt_fast import _native
from imgopt_fast.benchmarks import machine
from imgopt_fast.benchmarks.case import Case, Disagreement, Runner, assemble, first_line
from imgopt_fast.benchmarks.machine import PEER_FAILURES
from imgopt_fast.benchmarks.timing import Timing, race

DISTURBED = 0.05
INT8_LOOP = "the loop behind the int8 rate"  # among the contestants of a case whose goal is a share of that rate


@dataclass(frozen=True)
class Row:
    """One peer: seconds per call, and how many times longer it takes than ours (below 1: ours loses)."""

    name: str
    seconds: float
    ratio: float
    spread: float | None = None  # median absolute deviation, as a share of the median; None for an imagined peer
    ratio_quartiles: tuple[float, float] | None = None
    samples: int = 0
    goal: float | None = None
    slack: float = 0.0

    def met(self, ours: float) -> bool | None:
        """Whether ours is as much faster as it should be; None where nothing is asked."""
        return None if self.goal is None else ours <= self.seconds / self.goal + self.slack


@dataclass(frozen=True)
class Result:
    """A case that ran, or `failure`: why it did not."""

    subject: str
    case: str
    threads: int
    isa: str | None
    seconds: float = 0.0
    spread: float = 0.0
    samples: int = 0
    floor: float | None = None
    best_goal: float | None = None
    floor_goal: float | None = None
    peers: tuple[Row, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    waited: float = 0.0  # share of the run that the process was ready but had no core
    failure: str | None = None
    note: str | None = None  # why a goal is missed

    def goals(self) -> list[bool]:
        """Which of the case's goals are met."""
        met = [row.met(self.seconds) for row in self.peers if row.goal is not None]
        if self.best is not None and self.best_goal is not None:
            met.append(self.best.ratio >= self.best_goal)
        if self.floor is not None and self.floor_goal is not None:
            met.append(self.floor / self.seconds >= self.floor_goal)
        return [bool(m) for m in met]

    @property
    def disturbed(self) -> bool:
        """Whether other programs spoilt it: with several threads time is wall time, and one that waits delays all."""
        return self.threads > 1 and self.waited > DISTURBED

    @property
    def best(self) -> Row | None:
        """The fastest real peer, ours under other settings not counted."""
        real = [row for row in self.peers if row.spread is not None and not row.name.startswith("ours")]
        return min(real, key=lambda row: row.seconds, default=None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def from_dict(data: Mapping[str, Any]) -> Result:
    """The Result that as_dict() gave, after a way through JSON."""
    rows = tuple(
        Row(**{**row, "ratio_quartiles": tuple(row["ratio_quartiles"]) if row["ratio_quartiles"] else None})
        for row in data["peers"]
    )
    return Result(**{**data, "peers": rows})


def run(case: Case, *, threads: int, seconds: float) -> Result:
    """Verify a case, then time its contestants in turns, each for about `seconds`."""
    threads = case.threads or threads
    isa = case.isa or _native.active_isa()
    machine.use_threads(threads)
    try:
        if threads > (cores := machine.core_count()):
            return Result(case.subject, case.name, threads, isa, failure=f"needs {threads} cores, has {cores}")
        contest = assemble(case)
        calls = {"": contest.ours.call, **{name: peer.call for name, peer in contest.peers.items()}}
        loop = machine.int8_loop() if case.floor_goal is not None and threads == 1 else None
        if loop is not None:
            calls[INT8_LOOP] = loop[0]
        begin, waiting = time.perf_counter(), machine.seconds_without_core()
        timings = race(calls, seconds, threads=threads)
        waited = (machine.seconds_without_core() - waiting) / (time.perf_counter() - begin) / threads
        waited = min(1.0, waited)  # a peer's pool may hold more threads than take part
        rates = machine.measure(case.isa)
        ours = timings.pop("")
        if loop is not None and rates is not None:
            rates = replace(rates, int8_dot=loop[1] / timings.pop(INT8_LOOP).median)
        rows = [row_of(name, timing, contest.peers[name]) for name, timing in timings.items()]
        if rates is not None:
            for name, (imagined, goal) in case.ideals(rates).items():
                rows.append(Row(name, imagined, imagined / ours.median, goal=goal))
        return Result(
            case.subject, case.name, threads, isa, ours.median, ours.spread, len(ours.samples),
            None if rates is None else case.work().floor(rates, threads),
            case.best_goal, case.floor_goal, tuple(rows), contest.absent, waited, note=case.note,
        )  # fmt: skip
    except Disagreement as error:
        return Result(case.subject, case.name, threads, isa, failure=f"WRONG RESULT, not timed: {first_line(error)}")
    except (*PEER_FAILURES, NotImplementedError, ValueError, AttributeError) as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
        return Result(case.subject, case.name, threads, isa, failure=failure)
    finally:
        case.release()


def row_of(name: str, timing: Timing, peer: Runner) -> Row:
    quartiles, count = timing.ratio_quartiles, len(timing.samples)
    return Row(name, timing.median, timing.ratio, timing.spread, quartiles, count, peer.goal, peer.slack)


def heading(description: Mapping[str, Any]) -> Iterator[str]:
    """The machine in a few lines, from machine.describe()."""
    rates = description["rates"]
    yield f"{description['cpu']}, {description['cores']} cores, {description['system']}"
    yield f"features  {' '.join(description['features'])}"
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in description["versions"].items())
    yield f"versions  {versions}"
    said = ", ".join(f"{name} {isa}" for name, isa in description["peer_isa"].items())
    yield f"ISA       ours {description['isa']} ({description['backend']}); peers say: {said}"
    if rates is None:
        yield "one core  not measured: there are no compiled kernels"
    else:
        memory = (
            f"{level.upper()} {rates[f'read_{level}'] / 1e9:.0f} | {rates[f'copy_{level}'] / 1e9:.0f}"
            for level in ("l2", "l3", "dram")
        )
        arithmetic = f"{rates['fma'] / 1e9:.0f} GFLOP/s float32, {rates['int8_dot'] / 1e9:.0f} GOP/s int8"
        yield f"one core  {arithmetic}; read | copy in GB/s: {', '.join(memory)}; measured now"
    clock = "CPU time" if description["threads"] == 1 else "wall time"
    yield f"threads   {description['threads']}, pinned to as many cores; {clock}, warm, in turns, median ± MAD"
    yield f"memory    torch allocates large tensors in {'huge' if description['huge_pages'] else 'small'} pages"


def lines(result: Result) -> Iterator[str]:
    """A result as text: ours, then the peers from the fastest to the slowest."""
    where = f"{result.threads} thread{'s' if result.threads > 1 else ''}, {result.isa or 'no kernels'}"
    if result.failure is not None:
        yield f"{result.case:<46} {result.failure}  [{where}]"
        return
    floor = "" if result.floor is None else f"{result.floor / result.seconds:5.0%} of the floor"
    if result.floor is not None and result.floor_goal is not None:
        met = result.floor / result.seconds >= result.floor_goal
        floor += f" (goal {result.floor_goal:.0%}: {'met' if met else 'MISSED'})"
    yield f"{result.case:<46} {duration(result.seconds)} ±{result.spread:4.0%}  {floor}  [{where}]"
    if result.disturbed:
        yield f"    the machine is busy: no core for {result.waited:.0%} of the run; these figures mean nothing"
    for row in sorted(result.peers, key=lambda row: row.seconds):
        spread = "      " if row.spread is None else f"±{row.spread:4.0%}"
        judged = comparison(row.ratio) + verdict(row, result.seconds)
        yield f"    {row.name:<42} {duration(row.seconds)} {spread}  {judged}"
    if result.best is not None and result.best_goal is not None:
        met = result.best.ratio >= result.best_goal
        yield f"    {'best peer: ' + result.best.name:<61} goal {result.best_goal:g}x: {'met' if met else 'MISSED'}"
    for name, reason in result.absent.items():
        yield f"    {name:<42} {reason}"
    if result.note is not None and not all(result.goals()):
        yield f"    missed: {result.note}"


def comparison(ratio: float) -> str:
    return f"ours {ratio:5.2f}x as fast" if ratio >= 1 else f"OURS {1 / ratio:5.2f}x SLOWER "


def verdict(row: Row, ours: float) -> str:
    met = row.met(ours)
    return "" if met is None else f"   goal {row.goal:.3g}x: {'met' if met else 'MISSED'}"


def duration(seconds: float) -> str:
    """Fixed width, three digits."""
    unit, size = next((u for u in (("s ", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("us", 1e-6))
    value = seconds / size
    return f"{value:6.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
