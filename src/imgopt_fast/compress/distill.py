"""Knowledge distillation: a student learns from labels and from a teacher's softened logits.

The loss of Hinton, Vinyals and Dean (2015): the gradient of a softened cross entropy shrinks with 1/T², so the soft
term carries a factor T²; without it the balance between the two terms would move with the temperature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 − alpha) · cross entropy with `target` + alpha · T² · KL(teacher ‖ student), both averaged over the batch.

    `student_logits`, `teacher_logits`: (N, classes), floating; the softened distributions are softmax(logits / T) and
    the divergence is summed over the classes ("batchmean"). No gradient reaches the teacher. `target`: class indices
    (N,) or probabilities (N, classes); without it the loss is the soft term alone and `alpha` must be 1. The terms are
    computed in float32 when the logits are float16 or bfloat16.

    Raises ValueError for shapes that differ, a temperature that is not positive and finite, or an alpha outside [0, 1].
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "teacher_logits: expected the shape (N, classes) of student_logits, "
            f"{tuple(student_logits.shape)}, got {tuple(teacher_logits.shape)}"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if target is None and alpha != 1:
        raise ValueError(f"target: needed for the hard term, whose weight is 1 - alpha = {1 - alpha:g}")

    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft
    if target is not None:
        loss = loss + (1 - alpha) * F.cross_entropy(student, target, label_smoothing=label_smoothing)
    return loss
