"""The contrast against the whole dataset: against the papers written as loops, finite differences, and its limits.

b rows, B columns, row i's partner is column offset + i.
"""

from __future__ import annotations

import math

import pytest
import torch

from kd_accel.losses import global_contrastive as gcl

OFFSET, EPS, RHO = 2, 1e-3, 6.5


def _logits(b: int = 3, columns: int = 7, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(b, columns, dtype=torch.float64)


def _inner(row: list[float], own: int) -> float:
    """g of one row, as in the papers: the mean over the others of exp(z_j - z_own)."""
    return sum(math.exp(z - row[own]) for j, z in enumerate(row) if j != own) / (len(row) - 1)


def test_log_inner_is_the_papers_loop():
    """log of the mean over j != i of exp(z_ij - z_ii)."""
    logits = _logits()
    slow = [math.log(_inner(row, OFFSET + i)) for i, row in enumerate(logits.tolist())]
    torch.testing.assert_close(gcl.log_inner(logits, OFFSET), torch.tensor(slow, dtype=torch.float64))


def test_mean_exponent_is_the_papers_loop():
    """sum_j w_ij (z_ij - z_ii) over j != i, w_ij = exp(z_ij) / sum_k exp(z_ik)."""
    logits, slow = _logits(), []
    for i, row in enumerate(logits.tolist()):
        weights = [0.0 if j == OFFSET + i else math.exp(z) for j, z in enumerate(row)]
        slow.append(sum(w * (z - row[OFFSET + i]) for w, z in zip(weights, row, strict=True)) / sum(weights))
    torch.testing.assert_close(gcl.mean_exponent(logits, OFFSET), torch.tensor(slow, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [0.1, 0.8, 1.0])
def test_moved_average_is_that_of_the_numbers_themselves(gamma):
    """Its logarithm is (1 - gamma) u + gamma g."""
    u, g = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    torch.testing.assert_close(gcl.moved_average(u.log(), g.log(), gamma).exp(), (1 - gamma) * u + gamma * g)


def test_a_sample_never_seen_starts_at_the_batchs_estimate():
    """log u = -inf: u becomes g; with unseen_is_zero gamma g."""
    log_u, log_g = torch.full((2,), -math.inf), torch.tensor([-3.0, 4.0])
    torch.testing.assert_close(gcl.moved_average(log_u, log_g, 0.25), log_g)
    torch.testing.assert_close(gcl.moved_average(log_u, log_g, 0.25, unseen_is_zero=True), log_g + math.log(0.25))


def test_log_normaliser_is_log_of_eps_plus_u():
    """The value has nothing of g; eps = 0 leaves log u."""
    log_g, log_u = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(gcl.log_normaliser(log_g, log_u, math.log(EPS)), (EPS + log_u.exp()).log())
    torch.testing.assert_close(gcl.log_normaliser(log_g, log_u, -math.inf), log_u)


def test_gradient_is_that_of_the_estimate_over_the_normaliser():
    """d/dz of g / (eps + u) with u held: what FastCLIP and SogCLR descend."""
    logits, log_u = _logits().requires_grad_(), torch.randn(3, dtype=torch.float64)
    (actual,) = torch.autograd.grad(
        gcl.log_normaliser(gcl.log_inner(logits, OFFSET), log_u, math.log(EPS)).sum(), logits
    )
    own = torch.arange(3) + OFFSET
    positive = logits[torch.arange(3), own][:, None]
    others = torch.ones_like(logits).scatter(1, own[:, None], 0.0)
    g = ((logits - positive).exp() * others).sum(1) / (logits.shape[1] - 1)
    (expected,) = torch.autograd.grad((g / (EPS + log_u.exp())).sum(), logits)
    torch.testing.assert_close(actual, expected)


def test_gamma_of_one_gives_the_gradient_of_log_g():
    """u = g: the whole-dataset loss is that of the batch."""
    logits = _logits().requires_grad_()
    log_g = gcl.log_inner(logits, OFFSET)
    (actual,) = torch.autograd.grad(
        gcl.log_normaliser(log_g, log_g.detach(), -math.inf).sum(), logits, retain_graph=True
    )
    (expected,) = torch.autograd.grad(log_g.sum(), logits)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("formula", [gcl.log_inner, gcl.mean_exponent])
def test_gradient_is_that_of_finite_differences(formula):
    """autograd's first derivative is right, with the partners off the main diagonal."""
    assert torch.autograd.gradcheck(lambda z: formula(z, OFFSET), _logits().requires_grad_())


def test_temperature_statistic_is_the_derivative_by_the_temperature():
    """d/d tau of tau (log(eps + g(tau)) + rho) where u follows g at once."""
    cosines, tau = _logits(scale=0.3), torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    logits = cosines / tau[:, None]
    log_g = gcl.log_inner(logits, OFFSET)
    log_v = torch.logaddexp(log_g, torch.tensor(math.log(EPS), dtype=torch.float64))
    (expected,) = torch.autograd.grad((tau * (log_v + RHO)).sum(), tau)
    exponent = gcl.mean_exponent(logits, OFFSET)
    actual = gcl.temperature_statistic(log_g, log_v, exponent, RHO)
    torch.testing.assert_close(actual, expected, check_dtype=False)


def test_adam_step_is_torchs():
    """A sample's own Adam is torch's on a parameter of one number."""
    statistics = torch.randn(4, 3, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.full((3,), 0.03, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    tau, m, v = parameter.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for count, statistic in enumerate(statistics, start=1):
        parameter.grad = statistic.clone()
        optimizer.step()
        counts = torch.full_like(tau, count)
        tau, m, v = gcl.adam_step(tau, (m, v), counts, statistic, lr=0.01, betas=(0.9, 0.98), eps=1e-6)
    torch.testing.assert_close(tau, parameter.detach())


def test_momentum_step_follows_the_moving_average():
    """velocity <- beta velocity + (1 - beta) t; tau <- tau - lr velocity."""
    tau, velocity, statistic = (torch.rand(3, dtype=torch.float64) for _ in range(3))
    moved, speed = gcl.momentum_step(tau, velocity, statistic, lr=0.1, momentum=0.75)
    torch.testing.assert_close(speed, 0.75 * velocity + 0.25 * statistic)
    torch.testing.assert_close(moved, tau - 0.1 * speed)


def test_coldest_temperature_does_not_overflow():
    """At tau = 0.01 differences of cosines reach +-200, whose exp overflows fp32; value and gradient stay numbers."""
    logits = torch.tensor([[-100.0, 100.0, 0.0], [100.0, -100.0, 90.0]], requires_grad=True)
    log_g = gcl.log_inner(logits, 0)
    loss = gcl.log_normaliser(log_g, gcl.moved_average(torch.tensor([-150.0, 150.0]), log_g.detach(), 0.5), -40.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()
