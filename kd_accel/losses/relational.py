"""Losses between the relations of samples: distances, angles, queues, correlations, gradients.

Those over B rows need the whole batch and return one number, []; those with a queue return one per row. b rows of a
chunk, B rows of all ranks, K rows of a queue, d the student's width, e the teacher's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kd_accel.losses.distillation import kl_divergence, soft_cross_entropy

Scalar = Float[Tensor, ""]
ANCHORS = 16  # of the angles, at a time


def rkd_distance(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B e"]) -> Scalar:
    """Smooth L1 between the pairwise distances, each side's over its mean (RKD, arXiv 1904.05068, sec. 3.2.1)."""
    return F.smooth_l1_loss(_relative_distances(rows), _relative_distances(targets))


def _relative_distances(rows: Float[Tensor, "B d"]) -> Float[Tensor, "B B"]:
    """Euclidean distances over their mean, a sample's distance to itself left out."""
    pairs = len(rows) * (len(rows) - 1)
    squares = rows.square().sum(dim=1)
    distances = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))
    return distances * (pairs / distances.sum())


def rkd_angle(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B e"]) -> Scalar:
    """Smooth L1 between the cosines of the angles at every sample (RKD, arXiv 1904.05068, sec. 3.2.2).

    There are B^3 angles: they are made for ANCHORS samples at a time, and again in the backward pass, so that the
    largest tensor is ANCHORS x B x B (or d).
    """
    total = torch.zeros_like(rows[0, 0])
    for start in range(0, len(rows), ANCHORS):
        error: Tensor = checkpoint(
            _angle_error,
            rows,
            targets,
            start,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in there is random
        )
        total = total + error
    return total / len(rows) ** 3


def _angle_error(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B e"], start: int) -> Scalar:
    """Sum of the smooth L1 of all angles at ANCHORS samples from `start` on."""
    anchors = slice(start, start + ANCHORS)
    return F.smooth_l1_loss(_angles(rows, anchors), _angles(targets, anchors), reduction="sum")


def _angles(rows: Float[Tensor, "B d"], anchors: slice) -> Float[Tensor, "a B B"]:
    """Cosine of the angle j-i-k at each anchor i; 0 where j or k coincides with i."""
    differences = rows[None, :] - rows[anchors][:, None]  # [a, B, d]
    lengths = differences.norm(dim=2, keepdim=True)
    # Over infinity, no direction and no gradient; F.normalize's floor would let one of 1e12 times the error through.
    directions = differences / lengths.masked_fill(lengths == 0, torch.inf)
    angles: Tensor = directions @ directions.transpose(1, 2)
    return angles


def compress(
    rows: Float[Tensor, "b d"],
    targets: Float[Tensor, "b e"],
    row_queue: Float[Tensor, "K d"],
    target_queue: Float[Tensor, "K e"],
    temperature: float,
) -> Float[Tensor, "b"]:
    """KL between the distributions over a queue of earlier samples (CompRess, arXiv 2010.14713, sec. 3).

    Unit rows and queues; the 1q form compares both with the teacher's queue.
    """
    return kl_divergence(targets @ target_queue.T / temperature, rows @ row_queue.T / temperature)


def seed(
    rows: Float[Tensor, "b d"],
    targets: Float[Tensor, "b d"],
    queue: Float[Tensor, "K d"],
    temperature: float,
    teacher_temperature: float,
) -> Float[Tensor, "b"]:
    """Cross entropy of similarities to the own teacher feature and to a queue of earlier ones (SEED, arXiv 2101.04731).

    Unit rows and queue.
    """
    logits, said = (
        torch.cat([(side * targets).sum(dim=1, keepdim=True), side @ queue.T], dim=1) for side in (rows, targets)
    )
    return soft_cross_entropy(said / teacher_temperature, logits / temperature)


def vicreg(
    rows: Float[Tensor, "B d"],
    targets: Float[Tensor, "B d"],
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
) -> Scalar:
    """Invariance, variance and covariance of the embeddings (VICReg, arXiv 2105.04906, eq. 1 to 6).

    As in its authors' code, the hinge on the deviations is averaged over the two sides, where eq. 6 adds them, and the
    invariance is a mean over B and d, where eq. 5 adds over d.
    """
    invariance = F.mse_loss(rows, targets)
    variance = sum((1 - (side.var(dim=0) + 1e-4).sqrt()).relu().mean() for side in (rows, targets)) / 2
    covariance = sum(_off_diagonal(side.T.cov()).square().sum() for side in (rows, targets)) / rows.shape[1]
    return invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance


def barlow(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B d"], redundancy_weight: float) -> Scalar:
    """Cross-correlation of the dimensions towards the identity (Barlow Twins, arXiv 2103.03230, eq. 1, 2)."""
    return _redundancy(_cosines(rows - rows.mean(dim=0), targets - targets.mean(dim=0)), redundancy_weight)


def barlow_published(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B d"], redundancy_weight: float) -> Scalar:
    """The same as ITRA's code has it: dimensions not centred, and their cosines divided by B once more."""
    return _redundancy(_cosines(rows, targets) / len(rows), redundancy_weight)


def _cosines(rows: Float[Tensor, "B d"], targets: Float[Tensor, "B d"]) -> Float[Tensor, "d d"]:
    """Of every dimension of one with every dimension of the other, over the batch."""
    return F.normalize(rows, dim=0).T @ F.normalize(targets, dim=0)


def _redundancy(correlation: Float[Tensor, "d d"], redundancy_weight: float) -> Scalar:
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + redundancy_weight * _off_diagonal(correlation).square().sum()


def _off_diagonal(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    return matrix - matrix.diagonal().diag()


def gradient_distance(
    image: Float[Tensor, "B d"],
    text: Float[Tensor, "B d"],
    t_image: Float[Tensor, "B d"],
    t_text: Float[Tensor, "B d"],
    scale: Scalar | float,
    t_scale: Scalar | float,
) -> Scalar:
    """Squared distance of InfoNCE's gradients by unit features, student's and teacher's (GD of CLIP-KD, 2307.12732)."""
    ours = (*_info_nce_gradients(image, text, scale), *_info_nce_gradients(text, image, scale))
    theirs = (*_info_nce_gradients(t_image, t_text, t_scale), *_info_nce_gradients(t_text, t_image, t_scale))
    return torch.stack([F.mse_loss(our, their) for our, their in zip(ours, theirs, strict=True)]).sum()


def _info_nce_gradients(
    rows: Float[Tensor, "B d"], columns: Float[Tensor, "B d"], scale: Scalar | float
) -> tuple[Float[Tensor, "B d"], Float[Tensor, "B d"]]:
    """d/d rows and d/d columns of the mean of -log softmax(scale rows columns^T)[i, i]."""
    excess = (scale * rows @ columns.T).softmax(dim=1) - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return scale * excess @ columns / len(rows), scale * excess.T @ rows / len(rows)
