"""Times contestants against each other: alternated inside one run, so that a slow moment of the machine hits all.

Two separate loops on a shared or clock-shifting machine easily differ by 20 % for the same code; the ratio of
neighbouring samples does not. With one thread the clock is the CPU time of the process: the same as wall time on an
idle machine, and blind to other programs on the core (under a load of 11 on two cores, four medians of one convolution
lay between 0.42 and 2.5 ms by wall time, between 0.40 and 0.45 by CPU time). With more threads it is wall time. All
timings are warm: the same buffers from call to call, brought back into the caches after the other contestants' turns.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

SAMPLE_SECONDS = 1e-3  # a sample repeats short calls until it lasts so long
# Untimed calls before a sample. One is not enough: after a dense product of 1024 x 1024, reading 1 MB takes 40 us, then
# 12.8, 9.9 and 9.5 (a packed product at 99 % 222, 163, 145, 138 us). A longer call fills the caches by itself: to have
# others before it would double the run and change nothing.
WARMING_CALLS = 3
WARMED_SECONDS = 1e-2
CLOCK_TICK = 1e-7
FEWEST, MOST = 3, 40  # samples per contestant


@dataclass(frozen=True)
class Timing:
    """Seconds per call, and how often ours went into the neighbouring sample (1 for ours)."""

    samples: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Median absolute deviation from the median, as a share of the median."""
        middle = self.median
        return median(abs(s - middle) for s in self.samples) / middle

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        ordered = sorted(self.ratios)
        return ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]


def race(calls: Mapping[str, Callable[[], object]], seconds: float, *, threads: int = 1) -> dict[str, Timing]:
    """Time each of `calls` for about `seconds`, in turns; the first one is the one that ratios refer to.

    A slow contestant takes part in fewer rounds, spread evenly over the run.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats, rounds, warmed = {}, {}, {}
    for name, call in calls.items():
        once = min(timed(call, 1, clock), timed(call, 1, clock))
        warmed[name] = min(WARMING_CALLS, int(WARMED_SECONDS / once))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
        rounds[name] = min(MOST, max(FEWEST, round(seconds / (once * repeats[name]))))
    first = next(iter(calls))
    total = rounds[first]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(total):
        for name, call in calls.items():
            turns = min(rounds[name], total)
            if (turn + 1) * turns // total == turn * turns // total:
                continue
            for _ in range(warmed[name]):
                call()
            samples[name].append(timed(call, repeats[name], clock))
            ratios[name].append(samples[name][-1] / samples[first][-1])
    return {name: Timing(tuple(samples[name]), tuple(ratios[name])) for name in calls}


def timed(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds per call over `repeats` calls."""
    begin = clock()
    for _ in range(repeats):
        call()
    return max(clock() - begin, CLOCK_TICK) / repeats
