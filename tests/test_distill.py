"""distillation_loss against the formula written out in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from imgopt_fast.compress import distillation_loss


def written_out(student, teacher, target, temperature, alpha):
    """The definition, sample by sample and class by class."""
    total = 0.0
    for i in range(len(student)):
        p = torch.softmax(teacher[i].double() / temperature, 0)
        q = torch.softmax(student[i].double() / temperature, 0)
        soft = sum(float(p[c]) * (math.log(p[c]) - math.log(q[c])) for c in range(len(p)))
        hard = -math.log(torch.softmax(student[i].double(), 0)[target[i]])
        total += alpha * temperature**2 * soft + (1 - alpha) * hard
    return total / len(student)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.0), (4.0, 0.9), (2.5, 0.3), (7.0, 1.0)])
def test_matches_the_definition(temperature, alpha):
    student, teacher = torch.randn(5, 7), 3 * torch.randn(5, 7)
    target = torch.randint(7, (5,))
    loss = distillation_loss(student, teacher, target, temperature=temperature, alpha=alpha)
    assert float(loss) == pytest.approx(written_out(student, teacher, target, temperature, alpha), rel=1e-5)


def test_gradient_reaches_the_student_only():
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, 1, 1])
    distillation_loss(student, teacher, target).backward()
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, target), student)


def test_soft_gradient_keeps_its_size_when_the_temperature_grows():
    """The reason of the factor T²: for small logits the soft gradient tends to (student − teacher) / classes."""
    student, teacher = 0.01 * torch.randn(6, 4), 0.01 * torch.randn(6, 4)
    norms = []
    for temperature in (2.0, 20.0):
        leaf = student.clone().requires_grad_()
        distillation_loss(leaf, teacher, temperature=temperature, alpha=1.0).backward()
        norms.append(leaf.grad.norm())
    assert torch.isclose(*norms, rtol=0.02)


def test_half_precision_is_computed_in_float32():
    student, teacher, target = torch.randn(4, 9).half(), torch.randn(4, 9).half(), torch.randint(9, (4,))
    loss = distillation_loss(student, teacher, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(student.float(), teacher.float(), target))


def test_target_probabilities_and_smoothing():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    mixed = torch.softmax(torch.randn(4, 5), 1)
    loss = distillation_loss(student, teacher, mixed, alpha=0.0, label_smoothing=0.1)
    assert torch.allclose(loss, F.cross_entropy(student, mixed, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"teacher_logits": torch.zeros(3, 4)}, "teacher_logits: .*got \\(3, 4\\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"target": None}, "target"),
    ],
)
def test_bad_input(arguments, match):
    good = {"student_logits": torch.zeros(3, 5), "teacher_logits": torch.zeros(3, 5), "target": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=match):
        distillation_loss(**(good | arguments))
