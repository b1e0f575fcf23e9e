"""What a student is taught: the loss of its labels, and beside it a teacher's logits and features.

A teacher sees exactly the student's view of each image: the same tensor where both take the same normalization and
size, else the view replayed from its draws. Or it has said everything before (`--kd-cache`): its logits for the images
without augmentation are a table, and the teacher is never run again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgopt_fast.augment import Compose, Normalize
from imgopt_fast.compress import distillation_loss
from imgopt_fast.compress.quantize.simulate import SimulatedLinear
from imgopt_fast.data import Dataset, Split
from imgopt_fast.nn import MaskedLinear
from imgopt_fast.training.augmentation import Augmentation, View
from imgopt_fast.training.config import TrainConfig

BATCH = 256  # images per call when a table is made


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode, with the normalization and the (H, W) that it was trained with."""

    module: nn.Module
    normalize: Normalize
    size: tuple[int, int]


class Objective(nn.Module):
    """The loss of a view. Its parameters, those of the hint's projection, learn together with the student."""

    def __init__(
        self, config: TrainConfig, augment: Augmentation, dataset: Dataset, student: nn.Module, teacher: Teacher | None
    ) -> None:
        super().__init__()
        self.config, self.augment = config, augment
        self.teacher = teacher if config.distill_loss_weight > 0 or config.kd_hint_weight > 0 else None
        self.table = _table(self.teacher, dataset) if self.teacher is not None and config.kd_cache else None
        self.hints: tuple[Features, Features] | None = None
        if self.teacher is not None and config.kd_hint_weight > 0 and _head(student) is not None:
            ours, theirs = Features(student), Features(self.teacher.module)
            self.projection = nn.Linear(ours.count, theirs.count).to(next(student.parameters()).device)
            self.hints = ours, theirs

    def taught(self, view: View) -> Tensor | None:
        """The teacher's logits for `view`; its features, too, are those that `forward` compares with."""
        return None if self.teacher is None else self._taught(self.teacher, view)

    def forward(
        self, network: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, taught: Tensor | None
    ) -> Tensor:
        logits, config = network(images), self.config
        if taught is None:
            return F.cross_entropy(logits, targets, label_smoothing=config.smoothing)
        loss = distillation_loss(
            logits,
            taught,
            targets,
            temperature=config.kd_temperature,
            alpha=config.distill_loss_weight,
            label_smoothing=config.smoothing,
        )
        if self.hints is not None:
            ours, theirs = (hint.taken() for hint in self.hints)
            loss = loss + config.kd_hint_weight * F.mse_loss(
                F.normalize(self.projection(ours).float(), dim=1), F.normalize(theirs.float(), dim=1), reduction="sum"
            ) / len(ours)
        return loss

    def close(self) -> None:
        """Leave the networks as they were."""
        for hint in self.hints or ():
            hint.remove()

    @torch.no_grad()
    def _taught(self, teacher: Teacher, view: View) -> Tensor:
        if self.table is not None:
            return self.table[view.index.to(self.table.device)]
        logits: Tensor = teacher.module(self.augment.replay(view, teacher.normalize, teacher.size))
        return logits


class Features:
    """What the last linear layer of a network is given, in its latest call: the pooled features."""

    def __init__(self, module: nn.Module) -> None:
        head = _head(module)
        if head is None:
            raise ValueError("kd_hint_weight: expected networks with a linear layer")
        self.count = head.in_features
        self._latest: Tensor | None = None
        self.remove = head.register_forward_pre_hook(self._keep).remove

    def taken(self) -> Tensor:
        """The features of the latest call, flat; forgotten here."""
        assert self._latest is not None
        features, self._latest = self._latest.flatten(0, -2), None
        return features

    def _keep(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._latest = inputs[0]


def _head(module: nn.Module) -> nn.Linear | MaskedLinear | SimulatedLinear | None:
    """The last linear layer, of a network in quantization-aware training as well."""
    linears = [m for m in module.modules() if isinstance(m, (nn.Linear, MaskedLinear, SimulatedLinear))]
    return linears[-1] if linears else None


@torch.no_grad()
def _table(teacher: Teacher, dataset: Dataset) -> Tensor:
    """(N, classes) the teacher's logits for every training image as it is."""
    if not isinstance(dataset.train, Split):
        raise ValueError("kd_cache: expected a data set that is kept decoded, got a stream of shards")
    prepare = Compose([teacher.normalize])
    logits = []
    for batch in dataset.train.in_order(BATCH):
        images = prepare(batch.images)
        if tuple(images.shape[2:]) != teacher.size:
            images = F.interpolate(images, teacher.size, mode="bilinear", antialias=True)
        logits.append(teacher.module(images))
    return torch.cat(logits)
