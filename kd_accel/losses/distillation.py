"""Losses between a student and its teacher, one number per row."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def soft_cross_entropy(target_logits: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """-sum_j softmax(target)_ij log softmax(logits)_ij of each row (the distillation loss of open_clip)."""
    return -(target_logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def kl_divergence(target_logits: Float[Tensor, "b B"], logits: Float[Tensor, "b B"]) -> Float[Tensor, "b"]:
    """KL(softmax(target) || softmax(logits)) of each row (CRD of CLIP-KD, arXiv 2307.12732, eq. 5).

    The soft cross entropy less the target's entropy: same gradient, and zero when both agree.
    """
    return soft_cross_entropy(target_logits, logits) - soft_cross_entropy(target_logits, target_logits)


def squared_distance(rows: Float[Tensor, "b d"], targets: Float[Tensor, "b d"]) -> Float[Tensor, "b"]:
    """||row_i - target_i||^2 of each row (FD of CLIP-KD, eq. 6, is its mean over d)."""
    return (rows - targets).square().sum(dim=1)
