"""Losses of a student and its teacher: against the papers written as loops, open_clip's module, and finite differences.

b rows, B columns, d width.
"""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from kd_accel.losses import contrastive, distillation

FORMULAS = [distillation.soft_cross_entropy, distillation.kl_divergence, distillation.squared_distance]


def _logits(b: int = 4, columns: int = 6) -> torch.Tensor:
    return 3 * torch.randn(b, columns, dtype=torch.float64)


def _softmax(row: list[float]) -> list[float]:
    return [math.exp(z) / sum(math.exp(other) for other in row) for z in row]


def _loop(formula, targets: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`formula` of each row's (target, own) probabilities, summed over the columns."""
    pairs = zip(targets.tolist(), rows.tolist(), strict=True)
    return torch.tensor([sum(map(formula, _softmax(t), _softmax(r))) for t, r in pairs], dtype=torch.float64)


def test_soft_cross_entropy_is_its_definition():
    """-sum_j q_ij ln p_ij."""
    targets, logits = _logits(), _logits()
    slow = _loop(lambda q, p: -q * math.log(p), targets, logits)
    torch.testing.assert_close(distillation.soft_cross_entropy(targets, logits), slow)


def test_kl_divergence_is_its_definition():
    """sum_j q_ij ln(q_ij / p_ij), the teacher first."""
    targets, logits = _logits(), _logits()
    slow = _loop(lambda q, p: q * math.log(q / p), targets, logits)
    torch.testing.assert_close(distillation.kl_divergence(targets, logits), slow)


def test_squared_distance_is_its_definition():
    """sum_k (x_ik - t_ik)^2; its mean over b and d is the mean squared error."""
    rows, targets = _logits(), _logits()
    slow = [sum((row[k] - target[k]) ** 2 for k in range(6)) for row, target in zip(rows, targets, strict=True)]
    actual = distillation.squared_distance(rows, targets)
    torch.testing.assert_close(actual, torch.stack(slow))
    torch.testing.assert_close(actual.mean() / rows.shape[1], F.mse_loss(rows, targets))


def test_mean_over_both_directions_is_open_clips_distill_loss():
    """DistillClipLoss's second part, with a teacher of another width and its own scale."""
    student = [F.normalize(torch.randn(6, 5), dim=1) for _ in range(2)]
    teacher = [F.normalize(torch.randn(6, 8), dim=1) for _ in range(2)]
    rows = 0.0
    for one, other in ((0, 1), (1, 0)):
        logits = contrastive.similarity_logits(student[one], student[other], 20.0)
        rows = rows + distillation.soft_cross_entropy(
            contrastive.similarity_logits(teacher[one], teacher[other], 50.0), logits
        )
    _, expected = open_clip.loss.DistillClipLoss()(*student, 20.0, *teacher, 50.0)
    torch.testing.assert_close(rows.mean() / 2, expected)


@pytest.mark.parametrize("formula", FORMULAS)
def test_gradient_is_that_of_finite_differences(formula):
    """autograd's first derivative by the student is right."""
    targets = _logits()
    assert torch.autograd.gradcheck(lambda z: formula(targets, z), _logits().requires_grad_())


@pytest.mark.parametrize("formula", [distillation.kl_divergence, distillation.squared_distance])
def test_agreement_costs_nothing(formula):
    """A student that equals its teacher has zero loss and zero gradient in every row."""
    targets = _logits()
    student = targets.clone().requires_grad_()
    rows = formula(targets, student)
    rows.sum().backward()
    torch.testing.assert_close(rows.detach(), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(student.grad, torch.zeros_like(targets))


def test_kl_and_soft_cross_entropy_pull_alike():
    """They differ by the teacher's entropy, which no student can change."""
    targets, first = _logits(), _logits()
    gradients = []
    for formula in (distillation.kl_divergence, distillation.soft_cross_entropy):
        student = first.clone().requires_grad_()
        formula(targets, student).sum().backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)


def test_kl_is_positive_and_not_symmetric():
    """KL(q || p) > 0 for q != p, and the order of its arguments matters."""
    targets, logits = _logits(), _logits()
    forward, backward = distillation.kl_divergence(targets, logits), distillation.kl_divergence(logits, targets)
    assert (forward > 0).all()
    assert not torch.allclose(forward, backward)


@pytest.mark.parametrize("formula", FORMULAS[:2])
def test_distributions_ignore_a_shift_of_the_row(formula):
    """A constant on all logits of a row changes nothing, the teacher's or the student's."""
    targets, logits = _logits(), _logits()
    shifted = formula(targets + torch.randn(4, 1), logits + torch.randn(4, 1))
    torch.testing.assert_close(shifted, formula(targets, logits))


@pytest.mark.parametrize("formula", FORMULAS)
def test_columns_may_be_permuted(formula):
    """The order of the columns carries no meaning."""
    targets, logits, order = _logits(), _logits(), torch.randperm(6)
    torch.testing.assert_close(formula(targets[:, order], logits[:, order]), formula(targets, logits))


def test_a_confidence_of_one_column_is_refused():
    """[b, 1] times [b] makes [b, b] without a word and weighs every row alike; the annotations catch such a shape."""
    checked = jaxtyped(distillation.squared_distance, typechecker=beartype)
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(4, 6), torch.zeros(4, 1))
