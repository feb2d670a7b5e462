"""Losses between embeddings of one sample: against their definitions as loops, finite differences, and agreement.

b rows, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from kd_accel.losses import distillation, embedding

DELTA, TEMPERATURE, STUDENT, TEACHER = 0.7, 4.0, 0.1, 0.04
CENTER = torch.linspace(-0.5, 0.5, 5, dtype=torch.float64)
PRIOR = torch.linspace(0.2, 1.8, 5, dtype=torch.float64)

huber = partial(embedding.mean_huber, delta=DELTA)
softmax_kl = partial(embedding.softmax_kl, temperature=TEMPERATURE)
sharpness = {"student_temperature": STUDENT, "teacher_temperature": TEACHER}
dino = partial(embedding.centered_cross_entropy, center=CENTER, **sharpness)
cpc = partial(embedding.prototype_cpc, prior=PRIOR, **sharpness)

REGRESSIONS = {
    "mse": embedding.mean_squared,
    "l1": embedding.mean_absolute,
    "huber": huber,
    "smooth_l1": embedding.smooth_l1,
    "cosine": embedding.cosine_distance,
    "softmax_kl": softmax_kl,
}
FORMULAS = REGRESSIONS | {"dino": dino, "cpc": cpc}


def of(formulas: dict[str, Callable]):
    return pytest.mark.parametrize("formula", formulas.values(), ids=formulas.keys())


def _rows(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(4, 5, dtype=torch.float64)


def _softmax(row: list[float], temperature: float) -> list[float]:
    total = sum(math.exp(z / temperature) for z in row)
    return [math.exp(z / temperature) / total for z in row]


def _loop(formula: Callable[[list[float], list[float]], float], rows: torch.Tensor, targets: torch.Tensor):
    """`formula` of each (row, target)."""
    pairs = zip(rows.tolist(), targets.tolist(), strict=True)
    return torch.tensor([formula(row, target) for row, target in pairs], dtype=torch.float64)


ELEMENTS = {
    "mse": (embedding.mean_squared, lambda x: x**2),
    "l1": (embedding.mean_absolute, abs),
    "huber": (huber, lambda x: x**2 / 2 if abs(x) <= DELTA else DELTA * (abs(x) - DELTA / 2)),
    "smooth_l1": (embedding.smooth_l1, lambda x: x**2 / 2 if abs(x) < 1 else abs(x) - 1 / 2),
}


@pytest.mark.parametrize(("formula", "element"), ELEMENTS.values(), ids=ELEMENTS.keys())
def test_regressions_are_means_over_the_width(formula, element):
    """(1 / d) sum_k f(row_k - target_k), on both sides of the kinks."""
    rows, targets = _rows(), _rows()
    slow = _loop(lambda row, target: sum(element(x - y) for x, y in zip(row, target, strict=True)) / 5, rows, targets)
    torch.testing.assert_close(formula(rows, targets), slow)


def test_softmax_kl_is_its_definition():
    """t^2 sum_k q_k ln(q_k / p_k) of the softmaxes over t, the teacher's q first."""
    rows, targets = _rows(3.0), _rows(3.0)

    def slow(row, target):
        q, p = _softmax(target, TEMPERATURE), _softmax(row, TEMPERATURE)
        return TEMPERATURE**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))

    torch.testing.assert_close(softmax_kl(rows, targets), _loop(slow, rows, targets))


def test_softmax_kl_of_high_temperature_is_half_the_centred_squared_distance():
    """Why t^2 is there: the loss keeps its size as t grows (Hinton et al., sec. 2.1)."""
    rows, targets = _rows(), _rows()
    differences = (rows - rows.mean(1, keepdim=True)) - (targets - targets.mean(1, keepdim=True))
    expected = differences.square().mean(dim=1) / 2
    torch.testing.assert_close(embedding.softmax_kl(rows, targets, 1e4), expected, rtol=1e-3, atol=0)


def test_cosine_distance_is_its_definition():
    """1 - <row, target> / (|row| |target|)."""
    rows, targets = _rows(), _rows()

    def slow(row, target):
        dot = sum(x * y for x, y in zip(row, target, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in row) * sum(y * y for y in target))

    torch.testing.assert_close(embedding.cosine_distance(rows, targets), _loop(slow, rows, targets))


def test_cosine_distance_ignores_length():
    """It normalises inside, so its gradient has no part along the row."""
    rows, targets = _rows().requires_grad_(), _rows()
    losses = embedding.cosine_distance(rows, targets)
    losses.sum().backward()
    torch.testing.assert_close(embedding.cosine_distance(3 * rows, targets / 7), losses)
    torch.testing.assert_close((rows * rows.grad).sum(dim=1), torch.zeros(4, dtype=torch.float64))


def test_centered_cross_entropy_is_its_definition():
    """-sum_k q_k ln p_k, q the softmax of (target - center) / t_t, p of row / t_s."""
    rows, targets = _rows(0.2), _rows(0.2)

    def slow(row, target):
        q = _softmax([t - c for t, c in zip(target, CENTER.tolist(), strict=True)], TEACHER)
        return -sum(a * math.log(b) for a, b in zip(q, _softmax(row, STUDENT), strict=True))

    torch.testing.assert_close(dino(rows, targets), _loop(slow, rows, targets))


def test_prototype_cpc_is_its_definition():
    """-sum_k q_k row_k / t_s + ln sum_k prior_k exp(row_k / t_s), q the softmax of target / t_t."""
    rows, targets = _rows(0.2), _rows(0.2)

    def slow(row, target):
        q = _softmax(target, TEACHER)
        normaliser = sum(p * math.exp(z / STUDENT) for p, z in zip(PRIOR.tolist(), row, strict=True))
        return math.log(normaliser) - sum(a * z / STUDENT for a, z in zip(q, row, strict=True))

    torch.testing.assert_close(cpc(rows, targets), _loop(slow, rows, targets))


def test_prototype_cpc_of_an_even_prior_is_the_cross_entropy():
    """The prior starts at 1: softmax cross entropy, as DINO's with its centre at 0."""
    rows, targets = _rows(), _rows()
    even = embedding.prototype_cpc(rows, targets, torch.ones_like(PRIOR), **sharpness)
    torch.testing.assert_close(even, embedding.centered_cross_entropy(rows, targets, 0 * CENTER, **sharpness))


def test_a_larger_prior_pushes_its_prototype_down():
    """d loss / d row_k grows with prior_k: what the teacher says often earns less."""
    rows, targets = _rows(0.1).requires_grad_(), _rows(0.1)
    gradients = []
    for factor in (1.0, 2.0):
        prior = PRIOR * torch.tensor([factor, 1, 1, 1, 1])
        gradients.append(torch.autograd.grad(cpc(rows, targets, prior=prior).sum(), rows)[0])
    assert (gradients[1][:, 0] > gradients[0][:, 0]).all()
    assert (gradients[1][:, 1:] < gradients[0][:, 1:]).all()


def test_a_prototype_the_teacher_never_names_may_fall_to_zero():
    """The prior of one fades to 0 in fp32 within a thousand steps; the loss is then that of the other prototypes."""
    rows, targets = _rows().requires_grad_(), _rows()
    kept = torch.tensor([0.0, 1, 1, 1, 1])
    losses = cpc(rows, targets, prior=kept * PRIOR)
    losses.sum().backward()
    nearly = cpc(rows, targets, prior=PRIOR * kept.clamp(min=1e-30))
    torch.testing.assert_close(losses, nearly)
    assert torch.isfinite(rows.grad).all()


def test_teacher_probabilities_are_the_softmax_at_its_temperature():
    """Rows that sum to 1; what the running prior is fed with."""
    targets = _rows()
    slow = torch.tensor([_softmax(row, TEACHER) for row in targets.tolist()], dtype=torch.float64)
    torch.testing.assert_close(embedding.teacher_probabilities(targets, TEACHER), slow)


@of(FORMULAS)
def test_gradient_is_that_of_finite_differences(formula):
    """autograd's first derivative by the student is right."""
    targets = _rows()
    assert torch.autograd.gradcheck(lambda rows: formula(rows, targets), _rows().requires_grad_())


@of(REGRESSIONS)
def test_agreement_costs_nothing(formula):
    """A student that equals its teacher has zero loss and zero gradient in every row."""
    targets = _rows()
    rows = targets.clone().requires_grad_()
    losses = formula(rows, targets)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.zeros_like(losses))
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


def test_the_center_decides_where_dino_agrees():
    """The gradient is zero where row / t_s is (target - center) / t_t, up to a constant."""
    targets = _rows()
    rows = (STUDENT / TEACHER * (targets - CENTER) + torch.randn(4, 1)).requires_grad_()
    dino(rows, targets).sum().backward()
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))


@of(FORMULAS)
def test_rows_are_apart(formula):
    """A row's loss is a matter of that row alone, so a batch may come in chunks or in another order."""
    rows, targets, order = _rows(), _rows(), torch.randperm(4)
    whole = formula(rows, targets)
    torch.testing.assert_close(formula(rows[order], targets[order]), whole[order])
    torch.testing.assert_close(torch.cat([formula(rows[:3], targets[:3]), formula(rows[3:], targets[3:])]), whole)


@of(FORMULAS | {"soft_cross_entropy": lambda rows, targets: distillation.soft_cross_entropy(targets, rows)})
def test_large_embeddings_stay_finite(formula):
    """Raw embeddings of +-30 over 0.04 are logits of 750, whose exp overflows fp32 and fp64."""
    rows = torch.tensor([[-30.0, 30, 0, 1, 2], [30.0, -30, 0, 1, 2]]).requires_grad_()
    losses = formula(rows, -rows.detach())
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(rows.grad).all()


def test_a_row_of_zeros_has_a_finite_cosine():
    """A dead text tower: no direction, distance 1."""
    rows, targets = torch.zeros(2, 5, requires_grad=True), F.normalize(torch.randn(2, 5), dim=1)
    losses = embedding.cosine_distance(rows, targets)
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.ones(2))
    assert torch.isfinite(rows.grad).all()


@of(FORMULAS)
def test_targets_of_another_width_are_refused(formula):
    """One column would broadcast over the width without a word; the annotations catch it."""
    function, given = getattr(formula, "func", formula), getattr(formula, "keywords", {})
    checked = jaxtyped(function, typechecker=beartype)
    with pytest.raises(TypeCheckError):
        checked(torch.zeros(4, 5), torch.zeros(4, 1), **given)
