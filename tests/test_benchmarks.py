"""The benchmarks never rot: every quick case runs, and what is wrong is never timed."""

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import BACKEND, optional, require

from imgopt_fast import _native
from imgopt_fast.benchmarks import SUBJECTS, cases, machine, networks, results
from imgopt_fast.benchmarks.case import Agreement, Case, Disagreement, Runner, Work, assemble
from imgopt_fast.benchmarks.machine import Rates
from imgopt_fast.benchmarks.timing import Timing, race
from imgopt_fast.cli import bench

ROOT = Path(__file__).parent.parent
RATES = Rates(
    fma=100e9, int8_dot=400e9, read_l2=200e9, copy_l2=100e9, read_l3=80e9, copy_l3=40e9, read_dram=20e9, copy_dram=10e9
)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A benchmark pins the process to its cores; the tests after this one want all of them."""
    threads, cores = torch.get_num_threads(), machine.available_cores()
    yield
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@dataclass(eq=False)
class Sum(Case):
    """A case whose peers are right, nearly right, wrong, or missing."""

    subject = "sum"
    name: str = "sum"
    quick: bool = True
    reference_is_right: bool = True

    def ours(self) -> Runner:
        return Runner(lambda: torch.ones(8).cumsum(0))

    def work(self) -> Work:
        return Work(flops=8)

    def ideals(self, rates: Rates) -> Mapping[str, tuple[float, float | None]]:
        return {"ideal": (1.0, 2.0)}

    def peers(self) -> Mapping[str, Callable[[], Runner]]:
        right = torch.arange(1.0, 9.0)

        def missing() -> Runner:
            raise ImportError("no module named missing\nsecond line")

        return {
            "torch": lambda: Runner(lambda: right if self.reference_is_right else right + 1),
            "near": lambda: Runner(lambda: right + 0.5, Agreement(0.5)),
            "wrong": lambda: Runner(lambda: right + 0.5, Agreement(0.1)),
            "nan": lambda: Runner(lambda: right * math.nan, Agreement(1e9)),
            "short": lambda: Runner(lambda: right[:4], Agreement(1e9)),
            "missing": missing,
        }


def test_a_peer_that_disagrees_is_not_timed() -> None:
    contest = assemble(Sum())
    assert set(contest.peers) == {"torch", "near"}
    assert set(contest.absent) == {"wrong", "nan", "short", "missing"}
    assert "100.00% of the values differ by more than 0.1" in contest.absent["wrong"]
    assert contest.absent["missing"] == "ImportError: no module named missing"


def test_disagreement_with_the_reference_is_an_error() -> None:
    with pytest.raises(Disagreement, match="ours and torch disagree"):
        assemble(Sum(reference_is_right=False))
    assert "WRONG RESULT" in (results.run(Sum(reference_is_right=False), threads=1, seconds=0.01).failure or "")


def test_agreement_allows_a_share_of_outliers() -> None:
    ours, theirs = torch.zeros(100), torch.zeros(100)
    theirs[0] = 9.0
    Agreement(1.0, outliers=0.01).check(ours, theirs)
    with pytest.raises(Disagreement, match="the worst by 9"):
        Agreement(1.0, outliers=0.005).check(ours, theirs)
    Agreement(0.1, relative=True).check(torch.full((2,), 10.0), torch.full((2,), 10.9))


def test_floor_is_the_slowest_of_arithmetic_and_memory() -> None:
    assert Work(flops=100e9).floor(RATES, 1) == pytest.approx(1.0)
    assert Work(int8_ops=400e9).floor(RATES, 2) == pytest.approx(0.5)
    # Beyond every cache: 1 GB is copied (1 read, 1 written) and 1 GB more is only read.
    assert Work(bytes_read=2e9, bytes_written=1e9).floor(RATES, 1) == pytest.approx(2e9 / 10e9 + 1e9 / 20e9)
    assert Work(flops=1.0, bytes_written=1e9).floor(RATES, 1) == pytest.approx(1e9 / 10e9)
    assert Work(bytes_read=1e4).floor(RATES, 1) == pytest.approx(1e4 / 200e9)  # within L2


class Products(Sum):
    """A case that is to reach a share of the int8 rate."""

    floor_goal = 0.5

    def work(self) -> Work:
        return Work(int8_ops=1000.0)


def test_a_goal_of_the_int8_rate_takes_turns_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(calls: Mapping[str, Callable[[], object]], seconds: float, *, threads: int) -> dict[str, Timing]:
        return {name: Timing((2.0 if name == results.INT8_LOOP else 3.0,), (1.0,)) for name in calls}

    monkeypatch.setattr(machine, "measure", lambda isa: RATES)
    monkeypatch.setattr(machine, "int8_loop", lambda: (lambda: 0, 100.0))
    monkeypatch.setattr(results, "race", pretend)
    found = results.run(Products(), threads=1, seconds=0.01)
    assert found.floor == pytest.approx(1000.0 / (100.0 / 2.0))
    assert {row.name for row in found.peers} == {"torch", "near", "ideal"}
    assert results.run(Sum(), threads=1, seconds=0.01).floor == pytest.approx(8 / RATES.fma)


def test_race_alternates_and_gives_slow_contestants_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr("time.process_time", lambda: now[0])

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds
            order.append(name)

        return call

    timings = race({"ours": contestant("ours", 0.01), "slow": contestant("slow", 0.04)}, seconds=0.2)
    assert timings["ours"].median == pytest.approx(0.01)
    assert timings["slow"].ratio == pytest.approx(4.0)
    assert len(timings["ours"].samples) == 20
    assert len(timings["slow"].samples) == 5
    timed = order[4:]  # two calls each find out how long they take
    assert timed.index("slow") < len(timed) - 1 - timed[::-1].index("ours"), "one after the other, not in turns"


def test_race_warms_short_calls_and_no_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], Counter[str]()
    monkeypatch.setattr("time.process_time", lambda: now[0])

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            now[0] += seconds
            calls[name] += 1

        return call

    timings = race({"short": contestant("short", 1e-3), "long": contestant("long", 2e-2)}, seconds=0.1)
    assert calls["short"] == 2 + (3 + 1) * len(timings["short"].samples)  # two find out how long they take
    assert calls["long"] == 2 + len(timings["long"].samples)


def test_result_survives_json_and_reads_well() -> None:
    result = results.run(Sum(), threads=1, seconds=0.01)
    assert result.failure is None
    again = results.from_dict(json.loads(json.dumps(result.as_dict())))
    assert again == result
    text = "\n".join(results.lines(result))
    assert "missing" in text
    assert "ideal" in text or _native.core() is None
    assert "busy" not in text
    assert "busy" in "\n".join(results.lines(replace(result, threads=2, waited=0.5)))
    slower = results.Row("peer", 0.5, 0.5, goal=2.0)
    assert slower.met(1.0) is False
    assert "OURS  2.00x SLOWER" in results.comparison(0.5)


def test_every_subject_has_quick_cases() -> None:
    for subject in SUBJECTS:
        names = [str(case) for case in cases(subject)]
        assert len(names) == len(set(names)), f"{subject}: two cases of one name"
        assert any(True for _ in cases(subject, quick=True))


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    return parser.parse_args(["bench", *words])


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--op", "sharpen"], "--op"), (["--threads", "0"], "--threads"), (["--threads", "9999"], "--threads")],
)
def test_bad_arguments_are_named(words: list[str], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        bench.run(parse(*words))


def test_a_result_file_that_cannot_be_written_is_known_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        bench.run(parse("--json", str(tmp_path / "missing" / "results.json")))
    with pytest.raises(ValueError, match="is a folder"):
        bench.run(parse("--json", str(tmp_path)))


def test_bench_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # set by the verb for its whole process; not for the tests after it
    monkeypatch.setattr("imgopt_fast.benchmarks.cases", lambda subject, quick: [Sum(), Sum("bad", True, False)])
    file = tmp_path / "results.json"
    assert bench.run(parse("--quick", "--op", "affine_warp", "--json", str(file))) == 1
    text = capsys.readouterr().out
    assert "WRONG RESULT" in text
    assert "1 cases, 1 more FAILED" in text
    data = json.loads(file.read_text())
    assert data["machine"]["threads"] == 1
    assert [entry["case"] for entry in data["results"]] == ["sum", "bad"]
    assert list(tmp_path.iterdir()) == [file]


def test_benchmark_files_run() -> None:
    require(BACKEND == "native", "compiled kernels")
    optional("pytest_benchmark")
    # In a process of its own: it pins itself to one core. "ours" is the contestant that is checked against PyTorch.
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-m", "quick", "--benchmark-disable"]
    command += ["-p", "no:cacheprovider", "-k", "ours and not resnet18"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_network_agrees_with_its_float_self() -> None:
    require(BACKEND == "native", "compiled kernels")
    assert set(assemble(networks.Int8Case("resnet8", 1), only="torch").peers) == {"torch"}


def test_report_names_a_reason_once_for_all_cases_that_it_explains() -> None:
    report = runpy.run_path(str(ROOT / "benchmarks" / "report.py"), run_name="report")
    slow = results.Result("sum", "packed 0%", 1, None, seconds=1.0, floor=0.5, floor_goal=0.9, note="too many loads")
    found = [
        slow,
        replace(slow, case="packed 90%"),
        replace(slow, case="packed 95%", floor_goal=0.4),  # met
        replace(slow, case="packed 90% blocks 4x1", note="other"),
        replace(slow, case="training 99%", absent={"torch": "no such dtype"}),
    ]
    assert list(report["absences"](found)) == [
        "training 99%, torch: no such dtype",
        "packed 0%, 90%, training 99%: missed, too many loads",
        "packed 90% blocks 4x1: missed, other",
    ]


def test_report_puts_measured_figures_into_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # As if the sum were the case that stands for the packed products.
    measured = replace(results.run(Sum(), threads=1, seconds=0.01), subject="masked_matmul", case="packed 90%")
    data = {"machine": machine.describe(), "results": [measured.as_dict()]}
    (tmp_path / "run.json").write_text(json.dumps(data))
    readme = tmp_path / "README.md"
    begin, end = "<!-- benchmarks: begin (python benchmarks/report.py) -->", "<!-- benchmarks: end -->"
    readme.write_text(f"before\n{begin}\nold figures\n{end}\nafter\n")
    command = ["report.py", tmp_path / "run.json", "--readme", readme, "--folder", tmp_path / "results"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*command, "--figure", tmp_path / "figure.svg")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "benchmarks" / "report.py"), run_name="__main__")
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old figures" not in text
    (page,) = (tmp_path / "results").glob("*.md")
    assert "masked_matmul: packed 90%" in page.read_text()
    assert "masked_matmul: packed 90%" in text
    assert (tmp_path / "figure.svg").stat().st_size > 0
    assert len(list((tmp_path / "results").glob("*.json"))) == 1
