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

OFFSET = 1


def cos_diff(targets: torch.Tensor, cosines: torch.Tensor) -> torch.Tensor:
    """With partners that are not on the main diagonal."""
    return distillation.cos_diff(targets, cosines, OFFSET)


ENTROPIC = [distillation.soft_cross_entropy, distillation.kl_divergence]
OF_SOFTMAXES = [*ENTROPIC, distillation.correlation_distance]
DISTANCES = [distillation.squared_distance, distillation.logit_mse, cos_diff]
FORMULAS = OF_SOFTMAXES + DISTANCES


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


def test_cross_entropy_of_is_its_definition():
    """-sum_j p_ij ln q_ij of probabilities that are given."""
    probabilities, logits = torch.rand(4, 6, dtype=torch.float64), _logits()
    slow = []
    for row, given in zip(logits.tolist(), probabilities.tolist(), strict=True):
        slow.append(-sum(p * math.log(q) for p, q in zip(given, _softmax(row), strict=True)))
    actual = distillation.cross_entropy_of(probabilities, logits)
    torch.testing.assert_close(actual, torch.tensor(slow, dtype=torch.float64))


def test_correlation_distance_is_its_definition():
    """1 - Pearson's correlation of the two distributions; it sees no difference in scale alone."""
    targets, logits = _logits(), _logits()
    rows = zip(targets.softmax(dim=1), logits.softmax(dim=1), strict=True)
    slow = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in rows])
    torch.testing.assert_close(distillation.correlation_distance(targets, logits), slow)
    flatter = (0.5 * targets.softmax(dim=1) + 0.5 / targets.shape[1]).log()
    torch.testing.assert_close(distillation.correlation_distance(targets, flatter), torch.zeros(4).double())


def test_correlation_distance_of_extremes_is_finite():
    """Of distributions on two different columns 2 (of two columns), of a flat one, which has no order, 1."""
    targets = torch.tensor([[-1e4, 1e4], [1e4, -1e4]])
    logits = torch.tensor([[1e4, -1e4], [0.0, 0.0]]).requires_grad_()
    rows = distillation.correlation_distance(targets, logits)
    rows.sum().backward()
    torch.testing.assert_close(rows.detach(), torch.tensor([2.0, 1.0]))
    assert torch.isfinite(logits.grad).all()


def test_an_ensembles_loss_is_the_mean_of_its_members():
    """MobileCLIP averages the teachers' distributions after the softmax, so their soft cross entropies too."""
    teachers, logits = [_logits(), _logits(), _logits()], _logits()
    mean = sum(t.softmax(dim=1) for t in teachers) / len(teachers)
    members = sum(distillation.soft_cross_entropy(t, logits) for t in teachers) / len(teachers)
    torch.testing.assert_close(distillation.cross_entropy_of(mean, logits), members)


def test_logit_mse_is_its_definition():
    """(1 / B) sum_j (t_ij - s_ij)^2."""
    targets, cosines = _logits(), _logits()
    slow = [sum((targets[i, j] - cosines[i, j]) ** 2 for j in range(6)) / 6 for i in range(4)]
    torch.testing.assert_close(distillation.logit_mse(targets, cosines), torch.stack(slow))


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_cos_diff_is_its_definition(offset):
    """relu(t_ii - s_ii) + (1 / (B - 1)) sum_{j != i} relu(s_ij - t_ij), whichever column holds the partner."""
    targets, cosines = _logits(), _logits()
    slow = []
    for i in range(4):
        gaps = (cosines[i] - targets[i]).tolist()
        own = gaps.pop(offset + i)
        slow.append(max(-own, 0) + sum(max(gap, 0) for gap in gaps) / len(gaps))
    actual = distillation.cos_diff(targets, cosines, offset)
    torch.testing.assert_close(actual, torch.tensor(slow, dtype=torch.float64))


def test_cos_diff_asks_for_no_more_than_the_teacher():
    """Partners that are nearer than the teacher's, and strangers that are farther, cost nothing."""
    targets = _logits()
    partners = F.pad(torch.eye(4), (OFFSET, 1))  # [4, 6]
    better = (targets + 2 * partners - 1).requires_grad_()
    rows = cos_diff(targets, better)
    rows.sum().backward()
    torch.testing.assert_close(rows.detach(), torch.zeros_like(rows))
    torch.testing.assert_close(better.grad, torch.zeros_like(better))


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


@pytest.mark.parametrize("formula", [distillation.kl_divergence, *DISTANCES])
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


@pytest.mark.parametrize("formula", ENTROPIC)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_logits_stay_finite(formula, size):
    """At temperature 0.01 logits reach +-100, at SEED's 1e-4 they reach 1e4: value and gradient are numbers in fp32."""
    targets = torch.tensor([[-size, size], [size, -size]])
    logits = (-targets).requires_grad_()
    rows = formula(targets, logits)
    rows.sum().backward()
    torch.testing.assert_close(rows.detach(), torch.full((2,), 2 * size))  # all the mass where the student has none
    torch.testing.assert_close(logits.grad, targets.sign().neg())


@pytest.mark.parametrize("formula", OF_SOFTMAXES)
def test_distributions_ignore_a_shift_of_the_row(formula):
    """A constant on all logits of a row changes nothing, the teacher's or the student's."""
    targets, logits = _logits(), _logits()
    shifted = formula(targets + torch.randn(4, 1), logits + torch.randn(4, 1))
    torch.testing.assert_close(shifted, formula(targets, logits))


@pytest.mark.parametrize("formula", [*OF_SOFTMAXES, *DISTANCES[:2]])
def test_columns_may_be_permuted(formula):
    """The order of the columns carries no meaning."""
    targets, logits, order = _logits(), _logits(), torch.randperm(6)
    torch.testing.assert_close(formula(targets[:, order], logits[:, order]), formula(targets, logits))


def test_samples_may_be_permuted():
    """cos_diff, whose partners are on the diagonal, goes along with a permutation of the samples."""
    targets, cosines = torch.randn(2, 6, 6, dtype=torch.float64)
    order = torch.randperm(6)
    shuffled = distillation.cos_diff(targets[order][:, order], cosines[order][:, order], 0)
    torch.testing.assert_close(shuffled, distillation.cos_diff(targets, cosines, 0)[order])


def test_a_confidence_of_one_column_is_refused():
    """[b, 1] times [b] makes [b, b] without a word and weighs every row alike; the annotations catch such a shape."""
    checked = jaxtyped(distillation.squared_distance, typechecker=beartype)
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(4, 6), torch.zeros(4, 1))
