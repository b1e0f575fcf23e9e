"""Turns measured results into the tables that are published, so that no figure is ever typed by hand.

    imgopt-fast bench --json results.json                measure
    python benchmarks/report.py results.json             keep it as benchmarks/results/<machine>.json, with all rows as
                                                         a table in <machine>.md; put the quick cases, which stand for
                                                         the rest, into README.md between its benchmark markers, and
                                                         draw them in docs/benchmarks.svg

Losses stand in the tables like wins. A run with failures is refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from imgopt_fast.benchmarks import SUBJECTS, cases, notes
from imgopt_fast.benchmarks.results import Result, Row, duration, from_dict, heading

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin (python benchmarks/report.py) -->", "<!-- benchmarks: end -->"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what `imgopt-fast bench --json` wrote")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "benchmarks.svg")
    parser.add_argument("--folder", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    data = json.loads(arguments.results.read_text())
    results = [from_dict(entry) for entry in data["results"]]
    if failed := [result for result in results if result.failure is not None]:
        print(f"report: {len(failed)} cases failed, first {failed[0].case}: {failed[0].failure}", file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    stem = arguments.folder / machine_name(data["machine"])
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    stem.with_suffix(".md").write_text(page(data["machine"], results))
    draw(representative(results), arguments.figure)
    readme = arguments.readme.read_text()
    if BEGIN not in readme or END not in readme:
        print(f"report: {arguments.readme} has no lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    arguments.readme.write_text(before + BEGIN + "\n\n" + summary(data["machine"], results) + "\n" + END + after)
    return 0


def machine_name(machine: dict[str, Any]) -> str:
    """A file name for this machine, e.g. amd-epyc-2-cores-1-thread."""
    text = f"{machine['cpu']} {machine['cores']} cores {machine['threads']} thread"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def summary(machine: dict[str, Any], results: list[Result]) -> str:
    """The README's section: the cases that stand for the rest, and where the rest is."""
    lines = [*table(representative(results)), "", *circumstances(machine)]
    lines.append(f"All {len(results)} cases: `benchmarks/results/{machine_name(machine)}.md`.")
    return "\n".join(lines) + "\n"


def representative(results: list[Result]) -> list[Result]:
    """The results of the quick cases."""
    quick = {(subject, str(case)) for subject in SUBJECTS for case in cases(subject, quick=True)}
    return [result for result in results if (result.subject, result.case) in quick]


def draw(results: list[Result], path: Path) -> None:
    """A bar per peer: how many times our time it takes, on a logarithmic axis; grey where ours is the slower."""
    plt.rcParams["svg.hashsalt"] = "imgopt_fast"  # the same figure from the same results
    bars = [(f"{r.case}: {row.name}", row.ratio) for r in results for row in sorted(r.peers, key=lambda row: row.ratio)]
    labels, ratios = zip(*bars, strict=True)
    figure, axes = plt.subplots(figsize=(9, 0.22 * len(bars) + 0.8), layout="constrained")
    axes.barh(labels, ratios, color=["tab:blue" if ratio >= 1 else "tab:gray" for ratio in ratios])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time of the peer / time of imgopt_fast")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(machine: dict[str, Any], results: list[Result]) -> str:
    """Every row of a run."""
    lines = ["# Benchmarks", "", *circumstances(machine), ""]
    for subject in dict.fromkeys(result.subject for result in results):
        chosen = [result for result in results if result.subject == subject]
        lines += [f"## {subject}", "", *table(chosen), ""]
        lines += [f"- {text}" for text in (*notes(subject), *dict.fromkeys(absences(chosen)))]
        lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def circumstances(machine: dict[str, Any]) -> Iterator[str]:
    """What was measured how, on what."""
    yield "`imgopt-fast bench`: every result is checked against PyTorch's before it is timed; contestants take turns,"
    yield "with the same number of threads. Time: median ± median absolute deviation. Floor: share of what the machine"
    yield "could do by rates measured in the same run. `peer 3.1x`: the peer takes 3.1 times as long as ours; **bold**"
    yield "where ours is the slower."
    yield ""
    yield "```"
    yield from heading(machine)
    yield "```"


def table(results: list[Result]) -> Iterator[str]:
    yield "| case | threads, ISA | ours | floor | peers |"
    yield "| --- | --- | ---: | ---: | --- |"
    for result in results:
        name, where = f"{result.subject}: {result.case}", f"{result.threads}, {result.isa}"
        if result.disturbed:
            yield f"| {name} | {where} | not measured: the machine was busy | | |"
            continue
        peers = ", ".join(cell(row) for row in sorted(result.peers, key=lambda row: row.ratio))
        floor = "" if result.floor is None else f"{result.floor / result.seconds:.0%}"
        time = f"{' '.join(duration(result.seconds).split())} ± {result.spread:.0%}"
        yield f"| {name} | {where} | {time} | {floor} | {peers} |"


def cell(row: Row) -> str:
    text = f"{row.name} {row.ratio:.2f}x" if row.ratio < 10 else f"{row.name} {row.ratio:.0f}x"
    return text if row.ratio >= 1 else f"**{text}**"


def absences(results: list[Result]) -> Iterator[str]:
    """Who did not take part, and why goals were missed: a line per reason, with all cases that it explains."""
    missed: dict[str, list[str]] = {}
    for result in results:
        for name, reason in result.absent.items():
            yield f"{result.case}, {name}: {reason}"
        if result.note is not None and not all(result.goals()):
            missed.setdefault(result.note, []).append(result.case)
    for note, names in missed.items():
        yield f"{listed(names)}: missed, {note}"


def listed(names: list[str]) -> str:
    """The names in a row, without the words that a name begins with like the one before: "packed 0%, 90%, 99%"."""
    shortened, before = [], list[str]()
    for name in names:
        words = name.split(" ")
        same = next((i for i, (a, b) in enumerate(zip(words[:-1], before, strict=False)) if a != b), len(words) - 1)
        shortened.append(" ".join(words[min(same, len(before)) :]))
        before = words
    return ", ".join(shortened)


if __name__ == "__main__":
    sys.exit(main())
