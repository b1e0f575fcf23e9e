"""The pytest-benchmark face of imgopt_fast.benchmarks: every contestant of a case is one test of the case's group.

    python -m pytest benchmarks                        all of it, one thread
    python -m pytest benchmarks -m quick               the cases that `imgopt-fast bench --quick` runs
    python -m pytest benchmarks --benchmark-disable    only checks that the contestants agree

IMGOPT_BENCH_THREADS sets the threads of every contestant. Besides what pytest-benchmark measures one after the other,
extra_info holds the ratio to ours from an alternated run, the floor, and the achieved rates.
"""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in imgopt_fast/cli/bench.py, before torch is loaded

from imgopt_fast.benchmarks import cases, machine
from imgopt_fast.benchmarks.case import Case, assemble, first_line
from imgopt_fast.benchmarks.machine import PEER_FAILURES
from imgopt_fast.benchmarks.results import heading
from imgopt_fast.benchmarks.timing import race

THREADS = int(os.environ.get("IMGOPT_BENCH_THREADS", "1"))
RACE_SECONDS = 0.1


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: one of the few cases that stand for the rest")
    # The project's tests turn warnings into errors; that a peer deprecates its interface is no error here.
    config.addinivalue_line("filterwarnings", "default")
    machine.use_threads(THREADS)


def pytest_report_header() -> list[str]:
    return list(heading(machine.describe()))


def contestants(subject: str) -> list[object]:
    """Parameters (case, contestant): ours first, then every peer that the case names."""
    found = []
    for case in cases(subject):
        marks = [pytest.mark.quick] if case.quick else []
        for name in ("ours", *case.peers()):
            found.append(pytest.param(case, name, id=f"{case}-{name}", marks=marks))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        subject = metafunc.module.__name__.rpartition(".")[2].removeprefix("bench_")
        metafunc.parametrize(("case", "contestant"), contestants(subject))


@pytest.fixture
def contest(case: Case) -> Iterator[Case]:
    """Threads for the case, and its inputs gone afterwards."""
    if (case.threads or THREADS) > machine.core_count():
        pytest.skip(f"needs {case.threads} cores")
    machine.use_threads(case.threads or THREADS)
    yield case
    case.release()


@pytest.fixture
def compete(benchmark, contest: Case, contestant: str):  # type: ignore[no-untyped-def]
    """A function that checks a contestant against ours (or ours against the reference), then times it."""

    def run() -> None:
        peer = contest.reference if contestant == "ours" else contestant
        try:
            found = assemble(contest, only=peer)
        except PEER_FAILURES as error:
            if contestant == "ours":
                raise
            pytest.skip(f"{peer}: {first_line(error)}")
        if peer not in found.peers:
            pytest.skip(f"{peer}: {found.absent[peer]}")
        runner = found.ours if contestant == "ours" else found.peers[contestant]
        benchmark.group = f"{contest.subject}: {contest}"
        benchmark(runner.call)
        if benchmark.enabled:
            benchmark.extra_info.update(facts(contest, benchmark.stats.stats.median))
            if contestant != "ours":
                calls = {"ours": found.ours.call, peer: runner.call}
                timing = race(calls, RACE_SECONDS, threads=contest.threads or THREADS)[peer]
                benchmark.extra_info |= {"ratio": timing.ratio, "ratio_quartiles": timing.ratio_quartiles}

    return run


def facts(case: Case, seconds: float) -> dict[str, object]:
    """What a reader needs beside the time: threads, instruction set, achieved rates and share of the floor."""
    threads, work, rates = case.threads or THREADS, case.work(), machine.measure(case.isa)
    found: dict[str, object] = {"threads": threads, "isa": case.isa or machine.describe()["isa"], "warm": True}
    found["GB/s"] = (work.bytes_read + work.bytes_written) / seconds / 1e9
    if work.flops or work.int8_ops:
        found["GOP/s"] = (work.flops + work.int8_ops) / seconds / 1e9
    if rates is not None:
        found["floor_share"] = work.floor(rates, threads) / seconds
    return found
