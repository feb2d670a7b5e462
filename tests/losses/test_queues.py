"""Losses by similarities to earlier samples: against their definitions as loops, finite differences, and agreement.

b rows, K rows of a queue, d and e widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kd_accel.losses import relational

T, TEACHER_T = 0.04, 0.01


def _unit(rows: int, width: int = 4) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def of(formulas: dict[str, Callable]):
    return pytest.mark.parametrize("formula", formulas.values(), ids=formulas.keys())


def _softmax(row: list[float]) -> list[float]:
    return [math.exp(z) / sum(math.exp(other) for other in row) for z in row]


def _similarities(row: torch.Tensor, others: list[torch.Tensor], temperature: float) -> list[float]:
    return [(row @ other).item() / temperature for other in others]


def test_compress_is_its_definition():
    """sum_k q_k ln(q_k / p_k) of the similarities to K earlier samples, each side's own; widths may differ."""
    rows, targets, row_queue, target_queue = _unit(3, 4), _unit(3, 7), _unit(5, 4), _unit(5, 7)
    slow = []
    for row, target in zip(rows, targets, strict=True):
        p, q = (_softmax(_similarities(*side, T)) for side in ((row, list(row_queue)), (target, list(target_queue))))
        slow.append(sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)))
    actual = relational.compress(rows, targets, row_queue, target_queue, T)
    torch.testing.assert_close(actual, torch.tensor(slow, dtype=torch.float64))


def test_seed_is_its_definition():
    """-sum q ln p over the sample's own teacher feature and K earlier ones, each side at its own temperature."""
    rows, targets, queue = _unit(3), _unit(3), _unit(5)
    slow = []
    for row, target in zip(rows, targets, strict=True):
        p = _softmax(_similarities(row, [target, *queue], T))
        q = _softmax(_similarities(target, [target, *queue], TEACHER_T))
        slow.append(-sum(a * math.log(b) for a, b in zip(q, p, strict=True)))
    torch.testing.assert_close(
        relational.seed(rows, targets, queue, T, TEACHER_T), torch.tensor(slow, dtype=torch.float64)
    )


def _compress(rows: torch.Tensor, targets: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    return relational.compress(rows, targets, queue, queue, T)


def _seed(rows: torch.Tensor, targets: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    return relational.seed(rows, targets, queue, T, TEACHER_T)


QUEUED = {"compress": _compress, "seed": _seed}


@of(QUEUED)
def test_gradient_of_queued_losses_is_that_of_finite_differences(formula):
    """autograd's first derivative by the student is right."""
    targets, queue = _unit(3), _unit(5)
    assert torch.autograd.gradcheck(lambda rows: formula(rows, targets, queue), _unit(3).requires_grad_())


@of(QUEUED)
def test_order_carries_no_meaning(formula):
    """Neither of the batch, whose rows are apart, nor of the queue."""
    rows, targets, queue = _unit(4), _unit(4), _unit(5)
    batch, places = torch.randperm(4), torch.randperm(5)
    shuffled = formula(rows[batch], targets[batch], queue[places])
    torch.testing.assert_close(shuffled, formula(rows, targets, queue)[batch])


def test_agreement_of_compress_costs_nothing():
    """A student that equals its teacher and its queue: zero loss and zero gradient in every row."""
    targets, queue = _unit(4), _unit(5)
    rows = targets.clone().requires_grad_()
    losses = _compress(rows, targets, queue)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.zeros_like(losses))
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


def test_agreement_of_seed_leaves_the_teachers_entropy():
    """At one temperature for both, the gradient of a student that equals its teacher is zero, the value is not."""
    targets, queue = _unit(4), _unit(5)
    rows = targets.clone().requires_grad_()
    losses = relational.seed(rows, targets, queue, T, T)
    losses.sum().backward()
    said = (targets @ torch.cat([targets, queue]).T / T)[:, 3:].clone()  # its own, and the queue's
    said[:, 0] = 1 / T
    torch.testing.assert_close(losses.detach(), torch.distributions.Categorical(logits=said).entropy())
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


def test_a_temperature_of_1e_4_stays_finite():
    """SEED's teacher: logits of +-10,000 in fp32; its target is then the nearest feature, its own."""
    rows, targets, queue = _unit(4).float().requires_grad_(), _unit(4).float(), _unit(5).float()
    losses = relational.seed(rows, targets, queue, 0.07, 1e-4)
    losses.sum().backward()
    logits = torch.cat([(rows * targets).sum(dim=1, keepdim=True), rows @ queue.T], dim=1) / 0.07
    torch.testing.assert_close(losses, F.cross_entropy(logits, torch.zeros(4, dtype=torch.long), reduction="none"))
    assert torch.isfinite(rows.grad).all()
