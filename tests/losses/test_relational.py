"""Losses between relations within a batch: against their definitions as loops, finite differences, and agreement.

B rows of all ranks, d and e widths. Those with a queue are in test_queues.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kd_accel.losses import contrastive, relational

VICREG = {"invariance_weight": 25.0, "variance_weight": 20.0, "covariance_weight": 1.5}
LAMBDA, SCALE, TEACHER_SCALE = 0.3, 14.0, 100.0

vicreg = partial(relational.vicreg, **VICREG)
barlow = partial(relational.barlow, redundancy_weight=LAMBDA)
barlow_published = partial(relational.barlow_published, redundancy_weight=LAMBDA)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _unit(rows: int, width: int = 4) -> torch.Tensor:
    return F.normalize(_randn(rows, width), dim=1)


def gradient_distance(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of images `rows` with captions that are the same rows backwards, so that one argument is the student."""
    return relational.gradient_distance(rows, rows.flip(1), targets, targets.flip(1), SCALE, SCALE)


DISTANCE_AND_ANGLE = {"rkd_distance": relational.rkd_distance, "rkd_angle": relational.rkd_angle}
WHOLE = DISTANCE_AND_ANGLE | {
    "vicreg": vicreg,
    "barlow": barlow,
    "barlow_published": barlow_published,
    "gradient_distance": gradient_distance,
}


def of(formulas: dict[str, Callable]):
    return pytest.mark.parametrize("formula", formulas.values(), ids=formulas.keys())


def _smooth_l1(x: float) -> float:
    return x * x / 2 if abs(x) < 1 else abs(x) - 1 / 2


# RKD ------------------------------------------------------------------------------------------------------------------


def _slow_distances(rows: torch.Tensor) -> dict[tuple[int, int], float]:
    """|x_i - x_j| over the mean of those of i != j."""
    distances = {(i, j): math.dist(rows[i].tolist(), rows[j].tolist()) for i, j in product(range(len(rows)), repeat=2)}
    mean = sum(distances.values()) / (len(rows) * (len(rows) - 1))
    return {pair: distance / mean for pair, distance in distances.items()}


def test_rkd_distance_is_its_definition():
    """Mean over all B^2 pairs of the smooth L1 between relative distances; widths may differ."""
    rows, targets = _randn(5, 4), _randn(5, 7)
    ours, theirs = _slow_distances(rows), _slow_distances(targets)
    slow = sum(_smooth_l1(ours[pair] - theirs[pair]) for pair in ours) / 5**2
    # tight: the floor under a sample's distance to itself is 1e-6, and must not count
    torch.testing.assert_close(relational.rkd_distance(rows, targets).item(), slow, rtol=1e-10, atol=0)


def _slow_angle(rows: torch.Tensor, i: int, j: int, k: int) -> float:
    """Cosine of j-i-k; 0 without a direction."""
    if i in (j, k):
        return 0.0
    return F.cosine_similarity(rows[j] - rows[i], rows[k] - rows[i], dim=0).item()


@pytest.mark.parametrize("batch", [5, relational.ANCHORS + 1])
def test_rkd_angle_is_its_definition(batch):
    """Mean over all B^3 triples of the smooth L1 between cosines, also when the anchors come in slices."""
    rows, targets = _randn(batch, 4), _randn(batch, 7)
    triples = product(range(batch), repeat=3)
    slow = sum(_smooth_l1(_slow_angle(rows, *ijk) - _slow_angle(targets, *ijk)) for ijk in triples) / batch**3
    torch.testing.assert_close(relational.rkd_angle(rows, targets).item(), slow)


def test_the_gradient_of_sliced_angles_is_that_of_the_whole(monkeypatch):
    """All anchors at once give the same gradient."""
    rows, targets = _randn(2 * relational.ANCHORS + 1, 4).requires_grad_(), _randn(2 * relational.ANCHORS + 1, 4)
    (sliced,) = torch.autograd.grad(relational.rkd_angle(rows, targets), rows)
    monkeypatch.setattr(relational, "ANCHORS", len(rows))
    (whole,) = torch.autograd.grad(relational.rkd_angle(rows, targets), rows)
    torch.testing.assert_close(sliced, whole)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_angles_never_exist_all_at_once():
    """No tensor of the forward or backward pass is larger than a slice, and none of a slice is kept between them."""
    batch, kept = 3 * relational.ANCHORS, []
    rows, targets = _randn(batch, 4).requires_grad_(), _randn(batch, 4)
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = relational.rkd_angle(rows, targets)
        loss.backward()
    assert largest.elements == relational.ANCHORS * batch**2
    assert sum(kept) < batch**2


@of(DISTANCE_AND_ANGLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_samples_that_coincide_pull_no_harder_than_others(formula, dtype):
    """One picture twice in a batch, with different captions: no direction between its rows, so no gradient by one.

    The floor of F.normalize would make it 1e12 times as large.
    """
    rows, targets = (16 * _unit(6)).round().to(dtype) / 16, _unit(6).to(dtype)  # no rounding: exactly 0 apart
    (usual,) = torch.autograd.grad(formula(rows.requires_grad_(), targets), rows)
    twice = rows.detach()[[0, 0, 2, 3, 4, 5]].requires_grad_()
    loss = formula(twice, targets)
    (gradient,) = torch.autograd.grad(loss, twice)
    assert torch.isfinite(loss)
    assert gradient.norm() < 10 * usual.norm()


@of(DISTANCE_AND_ANGLE)
def test_rkd_sees_shapes_only(formula):
    """Moved, turned, and made larger, a student's batch is the same."""
    rows, targets = _randn(6, 4), _randn(6, 4)
    turn = torch.linalg.qr(_randn(4, 4)).Q
    torch.testing.assert_close(formula(3 * rows @ turn + _randn(4), targets), formula(rows, targets))


# Correlations ---------------------------------------------------------------------------------------------------------


def _slow_covariance(rows: torch.Tensor, k: int, m: int) -> float:
    x, y = rows[:, k].tolist(), rows[:, m].tolist()
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (len(x) - 1)


def test_vicreg_is_its_definition():
    """Squared distance; hinge on the deviation of each dimension; squared covariances of different dimensions."""
    rows, targets, d = _randn(6, 4) / 2, _randn(6, 4), 4
    invariance = sum((rows[i, k] - targets[i, k]) ** 2 for i in range(6) for k in range(d)).item() / (6 * d)
    variance, covariance = 0.0, 0.0
    for side in (rows, targets):
        deviations = [math.sqrt(_slow_covariance(side, k, k) + 1e-4) for k in range(d)]
        variance += sum(max(0.0, 1 - deviation) for deviation in deviations) / d / 2
        covariance += sum(_slow_covariance(side, k, m) ** 2 for k, m in product(range(d), repeat=2) if k != m) / d
    slow = sum(w * x for w, x in zip(VICREG.values(), (invariance, variance, covariance), strict=True))
    torch.testing.assert_close(vicreg(rows, targets).item(), slow)


def test_vicregs_invariance_is_all_there_is_between_the_sides():
    """A student that equals its teacher pays nothing for it; it still pays for a dimension that says nothing."""
    collapsed, targets = torch.zeros(6, 4, dtype=torch.float64), _randn(6, 4)
    assert relational.vicreg(targets, targets, 1.0, 0.0, 0.0) == 0
    torch.testing.assert_close(relational.vicreg(collapsed, collapsed, 0.0, 1.0, 0.0).item(), 1 - math.sqrt(1e-4))


def _slow_barlow(correlation: Callable[[int, int], float]) -> float:
    pairs = product(range(4), repeat=2)
    return sum((correlation(k, m) - 1) ** 2 if k == m else LAMBDA * correlation(k, m) ** 2 for k, m in pairs)


def test_barlow_is_its_definition():
    """sum_k (1 - C_kk)^2 + lambda sum_{k != m} C_km^2, C the correlation coefficients over the batch."""
    rows, targets = _randn(6, 4) + 1, _randn(6, 4) - 2
    both = torch.cat([rows, targets], dim=1)

    def correlation(k: int, m: int) -> float:
        deviations = math.sqrt(_slow_covariance(both, k, k) * _slow_covariance(both, 4 + m, 4 + m))
        return _slow_covariance(both, k, 4 + m) / deviations

    torch.testing.assert_close(barlow(rows, targets).item(), _slow_barlow(correlation))


def test_barlow_published_is_its_definition():
    """ITRA's: C_km is the cosine of the two columns, their means left in, over B."""
    rows, targets = _randn(6, 4) + 1, _randn(6, 4) - 2

    def correlation(k: int, m: int) -> float:
        return F.cosine_similarity(rows[:, k], targets[:, m], dim=0).item() / 6

    torch.testing.assert_close(barlow_published(rows, targets).item(), _slow_barlow(correlation))


def test_barlow_ignores_location_and_size_of_a_dimension():
    """A correlation does; the published form sees the mean."""
    rows, targets = _randn(6, 4), _randn(6, 4)
    other = 3 * rows + _randn(4)
    torch.testing.assert_close(barlow(other, targets), barlow(rows, targets))
    assert not torch.allclose(barlow_published(other, targets), barlow_published(rows, targets))


def test_barlow_of_uncorrelated_dimensions_is_nothing():
    """The identity: a student that equals a teacher whose dimensions are uncorrelated."""
    targets = torch.linalg.qr(_randn(8, 5) + torch.eye(8, 5)).Q  # orthonormal columns
    centred = targets - targets.mean(dim=0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov())).T
    torch.testing.assert_close(barlow(white, 2 * white).item(), 0.0)


# Gradients of InfoNCE -------------------------------------------------------------------------------------------------


def _autograd_gradients(image: torch.Tensor, text: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """d InfoNCE / d image and d text, of either direction."""
    gradients = []
    for rows, columns in ((image, text), (text, image)):
        leaves = [rows.clone().requires_grad_(), columns.clone().requires_grad_()]
        loss = contrastive.info_nce(contrastive.similarity_logits(*leaves, scale), 0).mean()
        gradients += torch.autograd.grad(loss, leaves)
    return gradients


def test_gradient_distance_is_its_definition():
    """Mean squared differences of what autograd gives for the student's InfoNCE and for the teacher's, added up."""
    image, text, t_image, t_text = (_unit(5) for _ in range(4))
    ours, theirs = _autograd_gradients(image, text, SCALE), _autograd_gradients(t_image, t_text, TEACHER_SCALE)
    slow = sum((our - their).square().mean() for our, their in zip(ours, theirs, strict=True))
    actual = relational.gradient_distance(image, text, t_image, t_text, SCALE, TEACHER_SCALE)
    torch.testing.assert_close(actual, slow)


def test_gradient_of_gradients_is_that_of_finite_differences():
    """By the student's features and by its scale."""
    image, text, t_image, t_text = (_unit(5) for _ in range(4))
    scale = torch.tensor(SCALE, dtype=torch.float64)

    def loss(image, text, scale):
        return relational.gradient_distance(image, text, t_image, t_text, scale, TEACHER_SCALE)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (image, text, scale)])


def test_the_two_towers_may_be_swapped():
    """Both directions count alike."""
    image, text, t_image, t_text = (_unit(5) for _ in range(4))
    swapped = relational.gradient_distance(text, image, t_text, t_image, SCALE, TEACHER_SCALE)
    torch.testing.assert_close(
        swapped, relational.gradient_distance(image, text, t_image, t_text, SCALE, TEACHER_SCALE)
    )


def test_gradients_of_a_sure_student_stay_finite():
    """Logits of +-100 in fp32."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = relational.gradient_distance(rows, rows.flip(0), rows.detach(), rows.detach(), 100.0, 100.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(rows.grad).all()


# All of the whole batch -----------------------------------------------------------------------------------------------


@of(WHOLE)
def test_gradient_is_that_of_finite_differences(formula):
    """autograd's first derivative by the student is right, through checkpoints too."""
    targets = _unit(5)
    assert torch.autograd.gradcheck(lambda rows: formula(rows, targets), _unit(5).requires_grad_())


@of(WHOLE)
def test_samples_may_be_permuted(formula):
    """The order of the samples carries no meaning."""
    rows, targets, order = _unit(6), _unit(6), torch.randperm(6)
    torch.testing.assert_close(formula(rows[order], targets[order]), formula(rows, targets))


@of(DISTANCE_AND_ANGLE | {"gradient_distance": gradient_distance})
def test_agreement_costs_nothing(formula):
    """A student that equals its teacher has zero loss and zero gradient."""
    targets = _unit(6)
    rows = targets.clone().requires_grad_()
    loss = formula(rows, targets)
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.0)
    torch.testing.assert_close(rows.grad, torch.zeros_like(rows))
