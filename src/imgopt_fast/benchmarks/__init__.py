"""What the benchmarks measure: cases, each with our call, its peers, the check that comes first, and its floor.

They live in the package, not in the checkout's benchmarks/ folder, so that `imgopt-fast bench` works for whoever
installed the package; the folder's bench_<op>.py run the very same cases under pytest-benchmark. A peer that is not
installed is left out, and said to be.
"""

from collections.abc import Iterator
from importlib import import_module

from imgopt_fast.benchmarks.case import Case

SUBJECTS = ("affine_warp", "photometric", "int8_conv2d", "masked_matmul", "networks", "pruning")


def cases(subject: str, *, quick: bool = False) -> Iterator[Case]:
    """The cases of one of SUBJECTS; with `quick`, the few that stand for them."""
    if subject not in SUBJECTS:
        raise ValueError(f"subject: expected one of {', '.join(SUBJECTS)}, got {subject!r}")
    for case in import_module(f"{__name__}.{subject}").CASES:
        if case.quick or not quick:
            yield case


def notes(subject: str) -> tuple[str, ...]:
    """Why the cases of a subject miss their goals, where its module says so."""
    found: tuple[str, ...] = getattr(import_module(f"{__name__}.{subject}"), "NOTES", ())
    return found
