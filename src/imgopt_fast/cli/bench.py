"""`imgopt-fast bench`: ours and its peers side by side, verified before timed, losses shown too."""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

# Seconds that every contestant of a case runs for.
FULL_SECONDS, QUICK_SECONDS = 0.15, 0.1


EXAMPLES = """examples:
  imgopt-fast bench --quick
  imgopt-fast bench --op affine_warp --threads 2 --json results.json
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="time the operations against their peers on this machine",
        description="Times every operation against PyTorch and the installed peers (OpenCV, kornia, albumentations, "
        "onnxruntime, OpenVINO, scipy), each with the same number of threads, after checking that the results agree.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few cases only, under a minute")
    parser.add_argument("--op", action="append", metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--threads", type=int, default=1, help="of every contestant (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine and results there")


def run(args: argparse.Namespace) -> int:
    """0 when every case ran and its result was right, 1 otherwise; ValueError for arguments that make no sense."""
    # For every contestant that allocates through torch, and before torch is loaded: a fresh result of 38 MB costs 17 ms
    # of page faults in small pages, 1.6 ms in huge ones, on the machine where filling it takes 1.2.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from imgopt_fast.benchmarks import SUBJECTS, cases, machine, results

    subjects = args.op or list(SUBJECTS)
    unknown = [name for name in subjects if name not in SUBJECTS]
    if unknown:
        raise ValueError(f"--op: expected one of {', '.join(SUBJECTS)}, got {unknown[0]}")
    machine.use_threads(1)
    if not 1 <= args.threads <= machine.core_count():
        raise ValueError(f"--threads: expected 1 to {machine.core_count()}, got {args.threads}")
    if args.json is not None and (problem := unwritable(args.json)):
        raise ValueError(f"--json: {problem}")
    machine.use_threads(args.threads)
    description = machine.describe()
    print(*results.heading(description), sep="\n")

    begin = time.monotonic()
    found: list[results.Result] = []
    for subject in subjects:
        print(f"\n{subject}", flush=True)
        for case in cases(subject, quick=args.quick):
            seconds = QUICK_SECONDS if args.quick else FULL_SECONDS
            found.append(results.run(case, threads=args.threads, seconds=seconds))
            print(*(f"  {line}" for line in results.lines(found[-1])), sep="\n", flush=True)
    print(f"\n{time.monotonic() - begin:.0f} s: {summary(found)}")
    if args.json is not None:
        write(args.json, {"machine": description, "results": [result.as_dict() for result in found]})
    return 1 if any(result.failure for result in found) else 0


def summary(found: list[Any]) -> str:
    """How the run as a whole went."""
    ran = [result for result in found if result.failure is None and not result.disturbed]
    text = f"{len(ran)} cases"
    if failed := sum(result.failure is not None for result in found):
        text += f", {failed} more FAILED"
    if disturbed := sum(result.disturbed for result in found):
        text += f", {disturbed} more not counted because the machine was busy"
    for subject in dict.fromkeys(result.subject for result in ran):
        best = [result.best.ratio for result in ran if result.subject == subject and result.best is not None]
        if best:
            mean = math.exp(sum(map(math.log, best)) / len(best))
            ahead = sum(ratio >= 1 for ratio in best)
            text += f"\n  {subject:<14} geometric mean {mean:5.2f}x the fastest peer of each case, "
            text += f"ahead in {ahead} of {len(best)}"
    goals = [met for result in ran for met in result.goals()]
    return text + (f"\n  {sum(goals)} of {len(goals)} goals met" if goals else "")


def unwritable(path: Path) -> str | None:
    """Why `path` cannot be written, None where it can: known before minutes of measuring, not after."""
    if path.is_dir():
        return f"{path} is a folder"
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.absolute().parent}"
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        return f"{path} cannot be written"
    return None


def write(path: Path, data: dict[str, Any]) -> None:
    """The whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)
