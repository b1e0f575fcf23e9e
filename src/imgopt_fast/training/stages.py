"""The stages of a training: which there are, for how long, and what is different in each."""

from dataclasses import dataclass

from imgopt_fast.training.config import TrainConfig

WARMUP = 0.25  # of a stage's epochs at most: the rate has to come down again, in two epochs as well
# Largest norm of the gradient in int8-aware training. Behind a batch norm the length of a weight does not matter; once
# the batch norm is folded, a step changes short weights by much. ResNet-20 on CIFAR-10, whose gradients have norms of 1
# to 3 there, went from a loss of 0.4 to 3.5 within five steps of twice the default rate; clipped, four times that rate
# does no harm.
AWARE_CLIP = 1.0


@dataclass(frozen=True)
class Stage:
    """Epochs under one optimizer and one rise and fall of the learning rate.

    `amp`: whether autocast is wanted. `keep_zeros`: weights that are zero at its start stay zero. `frozen`: only the
    last layer learns. `keep_statistics`: batch norm normalizes by what it knows, and learns no other statistics.
    `clip_grad`: largest norm of the gradient where the configuration has none.
    """

    name: str
    first_epoch: int
    epochs: int
    lr: float
    warmup_epochs: float
    amp: bool = True
    keep_zeros: bool = False
    frozen: bool = False
    keep_statistics: bool = False
    clip_grad: float | None = None

    @property
    def end(self) -> int:
        return self.first_epoch + self.epochs


def title(stage: str, config: TrainConfig) -> str:
    """What people call the network of `stage`."""
    if stage == "dense" and config.distill is not None and config.distill_loss_weight > 0 and config.epochs > 0:
        return "dense, distilled"
    return {"head": "new last layer", "dense": "dense float", "qat": "int8-aware"}.get(stage, stage)


def planned(config: TrainConfig) -> list[Stage]:
    """The stages of a training, in order; those without epochs are left out."""
    head = min(config.unfreeze or 0, config.epochs)  # none where the network is taken as it is
    plan = [
        ("head", head, config.lr, config.warmup_epochs),
        ("dense", config.epochs - head, config.lr, config.warmup_epochs),
        ("pruned", config.prune_epochs if config.sparsity > 0 else 0, config.prune_lr, config.prune_warmup_epochs),
        ("distilled", config.distilled_epochs(), config.prune_lr, config.prune_warmup_epochs),
        ("qat", config.qat_epochs if config.quantize != "none" else 0, config.qat_lr, 0.0),
    ]
    stages: list[Stage] = []
    for name, epochs, lr, warmup in plan:
        if epochs > 0:
            stages.append(
                Stage(
                    name,
                    first_epoch=stages[-1].end if stages else 0,
                    epochs=epochs,
                    lr=lr,
                    warmup_epochs=min(warmup, WARMUP * epochs),
                    amp=name != "qat",  # the simulated rounding needs more digits than bfloat16 has
                    keep_zeros=name not in ("head", "dense"),
                    frozen=name == "head" or (name == "dense" and config.transfer != "finetune" and not head),
                    keep_statistics=name == "dense" and head > 0,
                    clip_grad=AWARE_CLIP if name == "qat" else None,
                )
            )
    return stages
