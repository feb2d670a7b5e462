"""How well k-means finds the classes in image features, without a prompt or a label, as ProtoCLIP measures it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd_accel.models.kmeans import kmeans

ITERATIONS, RESTARTS, SEED = 100, 5, 0  # the first two are ProtoCLIP's (faiss there)


def cluster_agreement(images: Tensor, labels: Tensor, *, num_classes: int) -> dict[str, float | None]:
    """adjusted_rand_index and adjusted_mutual_info of the labels [n] int64 and `num_classes` clusters of unit images.

    images [n, d] of any length. 1 is agreement, 0 what chance gives. None where there are fewer images than classes.
    Ranks need not talk: on a CPU one thread, whatever their number, makes the sums, so that all round alike. Above
    10,000 images there, k-means goes by mini-batches.
    """
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score  # takes a second to import
    from threadpoolctl import threadpool_limits

    if len(images) < num_classes:
        return {"adjusted_rand_index": None, "adjusted_mutual_info": None}
    with threadpool_limits(1):
        clusters, _ = kmeans(
            F.normalize(images, dim=1), num_classes, iterations=ITERATIONS, restarts=RESTARTS, seed=SEED
        )
    clusters, labels = clusters.cpu().numpy(), labels.cpu().numpy()
    return {
        "adjusted_rand_index": float(adjusted_rand_score(labels, clusters)),
        "adjusted_mutual_info": float(adjusted_mutual_info_score(labels, clusters)),
    }
