"""Contrast against the whole dataset: a running normaliser u per sample, kept as its logarithm, and temperatures.

For sample i and one direction, z_ij = s_ij / tau_i:

    g_i = mean_{j != i} exp(z_ij - z_ii)      the batch's estimate
    u_i <- (1 - gamma) u_i + gamma g_i        remembered
    tau_i (log(eps + u_i) + rho)              minimised, with the gradient of g_i / (eps + u_i) for that of log u_i

(SogCLR, arXiv 2202.12387, alg. 1; iSogCLR, 2305.11965; FastCLIP, 2407.01445). The papers keep u;
its logarithm is the same mathematics and neither overflows at tau = 0.01 nor underflows for a well-aligned pair.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kd_accel.losses.contrastive import positives


def log_inner(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """log g_i = log of mean_{j != i} exp(z_ij - z_ii); needs B > 1."""
    others = logits.diagonal_scatter(torch.full_like(logits[:, 0], -math.inf), offset)
    return others.logsumexp(dim=1) - positives(logits, offset) - math.log(logits.shape[1] - 1)


def mean_exponent(logits: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """Mean of z_ij - z_ii over j != i under the weights exp(z_ij): -d log g / d log tau."""
    others = logits.diagonal_scatter(torch.full_like(logits[:, 0], -math.inf), offset)
    return (others.softmax(dim=1) * logits).sum(dim=1) - positives(logits, offset)


def moved_average(
    log_u: Float[Tensor, "b"], log_g: Float[Tensor, "b"], gamma: float, *, unseen_is_zero: bool = False
) -> Float[Tensor, "b"]:
    """log((1 - gamma) u + gamma g); a sample that was never seen, log u = -inf, starts at g.

    `unseen_is_zero`: it starts at gamma g instead, as in TempNet's code.
    """
    if gamma == 1:
        return log_g
    moved = torch.logaddexp(math.log1p(-gamma) + log_u, math.log(gamma) + log_g)
    return moved if unseen_is_zero else torch.where(log_u == -math.inf, log_g, moved)


def log_normaliser(
    log_g: Float[Tensor, "b"], log_u: Float[Tensor, "b"], log_eps: Float[Tensor, "b"] | float
) -> Float[Tensor, "b"]:
    """log(eps + u), with the gradient of g / (eps + u): u is a constant to autograd, and stands for g."""
    log_v = torch.logaddexp(log_u, torch.as_tensor(log_eps, dtype=log_u.dtype, device=log_u.device)).detach()
    ratio = torch.exp(log_g - log_v)
    return log_v + (ratio - ratio.detach())


def temperature_statistic(
    log_g: Float[Tensor, "b"], log_v: Float[Tensor, "b"], exponent: Float[Tensor, "b"], rho: float
) -> Float[Tensor, "b"]:
    """d/d tau_i of tau_i (log(eps + u_i) + rho); log_v = log(eps + u), exponent = mean_exponent."""
    return log_v + rho - torch.exp(log_g - log_v) * exponent


def adam_step(
    tau: Float[Tensor, "b"],
    moments: tuple[Float[Tensor, "b"], Float[Tensor, "b"]],
    count: Float[Tensor, "b"],
    statistic: Float[Tensor, "b"],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """(tau, m, v) of each sample after an Adam step of its own (FastCLIP-v2); `count` steps, with this one."""
    m = betas[0] * moments[0] + (1 - betas[0]) * statistic
    v = betas[1] * moments[1] + (1 - betas[1]) * statistic.square()
    m_hat, v_hat = m / (1 - betas[0] ** count), v / (1 - betas[1] ** count)
    return tau - lr * m_hat / (v_hat.sqrt() + eps), m, v


def momentum_step(
    tau: Float[Tensor, "b"], velocity: Float[Tensor, "b"], statistic: Float[Tensor, "b"], *, lr: float, momentum: float
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """(tau, velocity) of each sample after a step along the moving average of its statistic (iSogCLR)."""
    velocity = momentum * velocity + (1 - momentum) * statistic
    return tau - lr * velocity, velocity
