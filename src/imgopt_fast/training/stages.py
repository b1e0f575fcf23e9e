"""The stages of a training: which there are, for how long, and what is different in each."""

from dataclasses import dataclass

from imgopt_fast.training.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """Epochs under one optimizer and one rise and fall of the learning rate.

    `amp`: whether autocast is wanted. `keep_zeros`: weights that are zero at its start stay zero.
    """

    name: str
    first_epoch: int
    epochs: int
    lr: float
    warmup_epochs: float
    amp: bool = True
    keep_zeros: bool = False

    @property
    def end(self) -> int:
        return self.first_epoch + self.epochs


TITLES = {
    "dense": "dense float",
    "pruned": "pruned",
    "distilled": "distilled",
    "qat": "int8-aware",
    "int8": "int8",
}


def planned(config: TrainConfig) -> list[Stage]:
    """The stages of a training, in order; those without epochs are left out."""
    plan = [
        ("dense", config.epochs, config.lr, config.warmup_epochs),
        ("pruned", config.prune_epochs if config.sparsity > 0 else 0, config.prune_lr, config.prune_warmup_epochs),
        ("distilled", config.distilled_epochs(), config.prune_lr, config.prune_warmup_epochs),
        ("qat", config.qat_epochs if config.quantize != "none" else 0, config.qat_lr, 0.0),
    ]
    stages: list[Stage] = []
    for name, epochs, lr, warmup in plan:
        if epochs > 0:
            first = stages[-1].end if stages else 0
            # The simulated rounding needs more digits than bfloat16 has.
            stages.append(Stage(name, first, epochs, lr, min(warmup, epochs), name != "qat", name != "dense"))
    return stages
