"""Losses between a student's and a teacher's embedding of the same sample, one number per row.

b rows, d width. Nothing is normalised here unless a docstring says so.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd_accel.losses.distillation import cross_entropy_of, kl_divergence

Rows = Float[Tensor, "b d"]
PerRow = Float[Tensor, "b"]


def mean_squared(rows: Rows, targets: Rows) -> PerRow:
    """Mean over d of (row - target)^2."""
    return (rows - targets).square().mean(dim=1)


def mean_absolute(rows: Rows, targets: Rows) -> PerRow:
    """Mean over d of |row - target|."""
    return (rows - targets).abs().mean(dim=1)


def mean_huber(rows: Rows, targets: Rows, delta: float) -> PerRow:
    """Mean over d of x^2 / 2 where |x| <= delta, else delta (|x| - delta / 2)."""
    return F.huber_loss(rows, targets, reduction="none", delta=delta).mean(dim=1)


def smooth_l1(rows: Rows, targets: Rows) -> PerRow:
    """mean_huber with delta = 1, the name it has in SimReg and RKD."""
    return F.smooth_l1_loss(rows, targets, reduction="none").mean(dim=1)


def softmax_kl(rows: Rows, targets: Rows, temperature: float) -> PerRow:
    """t^2 KL(softmax(target / t) || softmax(row / t)) (Hinton et al., arXiv 1503.02531, sec. 2)."""
    return temperature**2 * kl_divergence(targets / temperature, rows / temperature)


def cosine_distance(rows: Rows, targets: Rows) -> PerRow:
    """1 - cosine; normalises both."""
    return 1 - F.cosine_similarity(rows, targets, dim=1)


def centered_cross_entropy(
    rows: Rows, targets: Rows, center: Float[Tensor, "d"], student_temperature: float, teacher_temperature: float
) -> PerRow:
    """-sum softmax((target - center) / t_t) log softmax(row / t_s) (DINO, arXiv 2104.14294, eq. 2).

    The centre is the caller's: the running mean of the batch means of the targets (eq. 4).
    """
    said = teacher_probabilities(targets - center, teacher_temperature)
    return cross_entropy_of(said, rows / student_temperature)


def prototype_cpc(
    rows: Rows, targets: Rows, prior: Float[Tensor, "d"], student_temperature: float, teacher_temperature: float
) -> PerRow:
    """-sum_k q_k row_k / t_s + log sum_k prior_k exp(row_k / t_s), q = softmax(target / t_t) (ProtoCPC of ProtoRKD).

    The prior is the caller's: the running mean of d times the batch mean of q, this batch included; it starts at 1.
    """
    logits = rows / student_temperature
    said = teacher_probabilities(targets, teacher_temperature)
    return (logits + prior.log()).logsumexp(dim=1) - (said * logits).sum(dim=1)


def teacher_probabilities(targets: Rows, temperature: float) -> Rows:
    """softmax(target / t)."""
    return (targets / temperature).softmax(dim=1)
