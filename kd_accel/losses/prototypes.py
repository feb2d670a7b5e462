"""Contrast with clusters of another modality, and the way back from clusters to features (ProtoCLIP).

b rows, E samples of an episode, K clusters, d the student's width, e that of the clustered features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd_accel.losses.distillation import cross_entropy_of


def cluster_means(features: Float[Tensor, "E d"], labels: Int[Tensor, "E"], clusters: int) -> Float[Tensor, "K d"]:
    """Mean feature of every cluster, not normalised; of an empty cluster 0; a label of -1 belongs to none.

    Prototype back-translation (ProtoCLIP, arXiv 2206.10996, sec. 3.2): features of one modality, clusters of another.
    Rows are sorted by cluster first: sums by index would differ in their last bits from call to call on a GPU.
    """
    belongs = labels >= 0
    features, labels = features[belongs], labels[belongs]
    counts = labels.bincount(minlength=clusters)
    sums = torch.segment_reduce(features[labels.argsort(stable=True)], "sum", lengths=counts)
    return sums / counts.clamp(min=1)[:, None]


def prototype_contrast(
    rows: Float[Tensor, "b d"],
    centroids: Float[Tensor, "K d"],
    labels: Int[Tensor, "b"],
    target_centroids: Float[Tensor, "K e"],
    scale: Float[Tensor, ""],
    target_temperature: float | None,
) -> Float[Tensor, "b"]:
    """Cross entropy of scale * <row, centroid_k> with the row's cluster y; 0 for a row without one (label -1).

    The target is softmax(<c_y, c_k> / t) over the clustered modality's centroids c, or y itself when t is None
    (ProtoCLIP, arXiv 2206.10996, sec. 3.2 and 3.3).
    """
    logits = scale * rows @ centroids.T
    own = labels.clamp(min=0).long()
    if target_temperature is None:
        losses = logits.logsumexp(dim=1) - logits.gather(1, own[:, None])[:, 0]
    else:
        near = (target_centroids[own] @ target_centroids.T / target_temperature).softmax(dim=1)
        losses = cross_entropy_of(near, logits)
    return torch.where(labels >= 0, losses, torch.zeros_like(losses))
