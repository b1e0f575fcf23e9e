"""What a user can decide about pruning."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from imgopt_fast._arguments import one_of


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, how far and when.

    Args:
        sparsity: share of the weights (of the channels, for structure "channels") to remove in the end, 0 to 1.
        method: "magnitude" removes the smallest absolute values, "random" any (seeded by `seed`).
        scope: "layer" prunes each layer alike, "global" ranks the weights of all layers together.
        structure: "unstructured"; "RxC", e.g. "4x1": blocks of R outputs by C inputs stand or fall together; "N:M",
            e.g. "2:4": at most N of M neighbouring inputs remain (`sparsity` is then 1 - N/M and unused); "channels":
            output channels are taken out of the network, which becomes a smaller dense one.
        start_step: steps before the first mask; 0: `prune` itself sets it.
        end_step: steps at which `sparsity` is reached, along a cubic ramp; at most start_step: one shot at start_step.
        update_every: steps between two masks.
        regrow: dynamic sparsity. The masks have `sparsity` from start_step on, and every `update_every` steps until
            end_step each layer drops its smallest weights and regrows as many: "gradient" where the loss falls
            fastest (RigL, Evci et al. 2020), "random" anywhere (SET, Mocanu et al. 2018). Regrown weights start at 0.
        drop_fraction: share of the kept weights that moves in the first such update; it falls along half a cosine.
        exclude: names of layers (or of modules above them) that stay as they are. With masks, the first convolution
            (at most 4 input channels) and depthwise convolutions stay dense in any case.
        seed: of everything random.

    Raises ValueError for values outside of these.
    """

    sparsity: float = 0.8
    method: Literal["magnitude", "random"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    structure: str = "unstructured"
    start_step: int = 0
    end_step: int = 0
    update_every: int = 1
    regrow: Literal["gradient", "random"] | None = None
    drop_fraction: float = 0.3
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity: expected a share from 0 to 1, got {self.sparsity}")
        one_of("method", self.method, ("magnitude", "random"))
        one_of("scope", self.scope, ("layer", "global"))
        if self.update_every < 1 or self.start_step < 0 or self.end_step < 0:
            raise ValueError(
                "start_step, end_step, update_every: expected at least 0, 0 and 1, "
                f"got {self.start_step}, {self.end_step} and {self.update_every}"
            )
        if isinstance(self.exclude, str):
            raise TypeError(f"exclude: expected a tuple of names, got {self.exclude!r}")
        parse_structure(self.structure)
        if self.regrow is not None:
            one_of("regrow", self.regrow, ("gradient", "random"))
            if self.n_of_m or self.channels:
                raise ValueError(f"regrow: expected structure 'unstructured' or 'RxC', got {self.structure!r}")
            if self.end_step <= self.start_step:
                raise ValueError(f"end_step: expected more than start_step={self.start_step} with regrow")
            if not 0 < self.drop_fraction <= 1:
                raise ValueError(f"drop_fraction: expected a share above 0, at most 1, got {self.drop_fraction}")

    @property
    def n_of_m(self) -> bool:
        return ":" in self.structure

    @property
    def channels(self) -> bool:
        return self.structure == "channels"

    def sparsity_at(self, step: int) -> float:
        """The sparsity that is due after `step` steps."""
        if step < self.start_step:
            return 0.0
        if step >= self.end_step or self.regrow is not None:
            return self.sparsity
        return self.sparsity * (1 - (1 - self._progress(step)) ** 3)

    def moving_at(self, step: int) -> float:
        """Share of the kept weights that a dynamic update after `step` steps drops and regrows."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * self._progress(step)))

    def due_at(self, step: int) -> bool:
        """Whether masks change after `step` steps."""
        last = max(self.start_step, self.end_step)
        if not self.start_step <= step <= last:
            return False
        return step == last or (step - self.start_step) % self.update_every == 0

    def _progress(self, step: int) -> float:
        return (step - self.start_step) / (self.end_step - self.start_step)


def parse_structure(structure: str) -> tuple[int, int]:
    """(R, C) of "RxC", (N, M) of "N:M", (1, 1) of the others; ValueError for what is none."""
    if structure in ("unstructured", "channels"):
        return (1, 1)
    match = re.fullmatch(r"(\d+)([x:])(\d+)", structure)
    if match is None:
        raise ValueError(f"structure: expected 'unstructured', 'RxC', 'N:M' or 'channels', got {structure!r}")
    first, second = int(match[1]), int(match[3])
    if min(first, second) < 1 or (match[2] == ":" and first > second):
        raise ValueError(f"structure: expected positive sizes, and N at most M, got {structure!r}")
    return first, second
