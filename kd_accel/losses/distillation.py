"""Losses between a student and its teacher, one number per row."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd_accel.losses.contrastive import positives


def cross_entropy_of(probabilities: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """-sum_j p_ij log softmax(logits)_ij of each row; an ensemble's target is the mean of its members' softmaxes."""
    return -(probabilities * logits.log_softmax(dim=1)).sum(dim=1)


def soft_cross_entropy(target_logits: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """-sum_j softmax(target)_ij log softmax(logits)_ij of each row (the distillation loss of open_clip)."""
    return cross_entropy_of(target_logits.softmax(dim=1), logits)


def kl_divergence(target_logits: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """KL(softmax(target) || softmax(logits)) of each row (CRD of CLIP-KD, arXiv 2307.12732).

    The soft cross entropy less the target's entropy: same gradient, and zero when both agree.
    """
    target = target_logits.log_softmax(dim=1)
    return (target.exp() * (target - logits.log_softmax(dim=1))).sum(dim=1)


def correlation_distance(target_logits: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """1 - the Pearson correlation of both softmaxes, of each row (inter-class relation of DIST, arXiv 2205.10536)."""
    target, own = (z.softmax(dim=1) - 1 / z.shape[1] for z in (target_logits, logits))  # a softmax has the mean 1 / B
    return 1 - F.cosine_similarity(target, own, dim=1)


def squared_distance(rows: Float[Tensor, "b d"], targets: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """||row_i - target_i||^2 of each row (FD of CLIP-KD is its mean over d)."""
    return (rows - targets).square().sum(dim=1)


def logit_mse(targets: Float[Tensor, "b B"], cosines: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """Mean over j of (t_ij - s_ij)^2 (`logits_mse` of DistillCLIP)."""
    return (cosines - targets).square().mean(dim=1)


def cos_diff(targets: Float[Tensor, "b B"], cosines: Float[Tensor, "b B"], offset: int) -> Float[Tensor, "b"]:
    """relu(t_ii - s_ii) + mean over j != i of relu(s_ij - t_ij), of cosines (`cos_diff` of DistillCLIP)."""
    gap = cosines - targets
    own = positives(gap, offset)
    strangers = (gap.relu().sum(dim=1) - own.relu()) / (gap.shape[1] - 1)
    return (-own).relu() + strangers
