"""Where the time of a training goes: each lap belongs to what was done since the one before."""

import time
from collections.abc import Mapping

import torch

PHASES = ("wait", "augment", "forward", "backward", "step")
RECORDED = "recorded"  # the last three of a step that a GPU replays


class Clock:
    """Seconds per phase. On a GPU the laps are marks in its queue, so that nothing waits for them to be reached."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """The next lap begins here."""
        self._collect()
        self._last = time.perf_counter()
        if self.cuda:
            self._mark("")

    def lap(self, phase: str) -> None:
        """What happened since the last call was `phase`."""
        if self.cuda:
            self._mark(phase)
        else:
            now = time.perf_counter()
            self._add(phase, now - self._last)
            self._last = now

    def seconds(self) -> dict[str, float]:
        self._collect()
        return dict(self._seconds)

    def share(self, phase: str) -> float:
        """Of the time of all phases."""
        return share(self.seconds(), phase)

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def _mark(self, phase: str) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def _collect(self) -> None:
        if not self._marks:
            return
        self._marks[-1][1].synchronize()
        for (_, before), (phase, event) in zip(self._marks, self._marks[1:], strict=False):
            if phase:
                self._add(phase, before.elapsed_time(event) / 1e3)
        self._marks = [("", self._marks[-1][1])]


def share(seconds: Mapping[str, float], phase: str) -> float:
    """Of the sum of all, 0 where nothing was done."""
    return seconds[phase] / max(sum(seconds.values()), 1e-12)
