"""k-means: scikit-learn on the CPU, Lloyd's iteration in torch on a GPU. E rows, K clusters, d width.

Both start alike (k-means++, or random rows where that would take longer than the rest), try `restarts` starts and keep
the one with the least inertia, and give labels with the means of their members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel.losses.prototypes import cluster_means

MOST_SPREAD = 1000  # clusters that k-means++ chooses one by one; beyond, random rows, as faiss does for ProtoCLIP
MOST_EXACT = 10_000  # rows for which scikit-learn's whole-batch KMeans is quick enough
DISTANCES_AT_ONCE = 2**26  # entries of the distance matrix that exist at a time: 256 MiB


def kmeans(features: Tensor, clusters: int, *, iterations: int, restarts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Euclidean k-means of `features[E,d]`: labels [E] int64 and centroids [K,d], the means of their members.

    A function of the rows and of 0 <= `seed` < 2^32. A cluster stays empty only where there are fewer different rows
    than clusters. Raises ValueError when there are fewer rows than clusters.
    """
    if len(features) < clusters:
        raise ValueError(f"{len(features)} rows cannot make {clusters} clusters: lower clusters, or give more rows")
    cluster = lloyd if features.is_cuda else _scikit
    return cluster(features.float(), clusters, iterations=iterations, restarts=restarts, seed=seed)


def lloyd(features: Tensor, clusters: int, *, iterations: int, restarts: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means in torch, on any device; the same on every call, on one device."""
    generator = torch.Generator(features.device).manual_seed(seed)
    runs = (_one_run(features, clusters, iterations, generator) for _ in range(restarts))
    labels, centroids, _ = min(runs, key=lambda run: run[2])
    return labels, centroids


def inertia(features: Tensor, labels: Tensor, centroids: Tensor) -> float:
    """Sum of the squared distances of all rows to the centroid of their cluster."""
    return _squared_distances(features, labels, centroids).sum().item()


def _one_run(
    features: Tensor, clusters: int, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """(labels, centroids, inertia) from one start, after `iterations` or when nothing moves any more."""
    start = _spread_rows if clusters <= MOST_SPREAD else _random_rows
    centroids = start(features, clusters, generator)
    labels = None
    for _ in range(iterations):
        before, labels = labels, _nearest(features, centroids)
        if before is not None and torch.equal(before, labels):
            break
        _fill_empty(features, labels, centroids)
        centroids = _means(features, labels, centroids)
    return labels, centroids, inertia(features, labels, centroids)


def _scikit(features: Tensor, clusters: int, *, iterations: int, restarts: int, seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.cluster import KMeans, MiniBatchKMeans  # takes a second to import: only for those who cluster

    options = {"max_iter": iterations, "n_init": restarts, "random_state": seed}
    options["init"] = "k-means++" if clusters <= MOST_SPREAD else "random"
    if len(features) <= MOST_EXACT:
        model = KMeans(clusters, **options)
    else:
        model = MiniBatchKMeans(clusters, batch_size=max(4096, clusters), **options)
    labels = torch.from_numpy(model.fit(features.numpy()).labels_).long()
    centroids = torch.from_numpy(model.cluster_centers_)
    _fill_empty(features, labels, centroids)  # mini-batches leave some now and then
    return labels, _means(features, labels, centroids)


def _random_rows(features: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """K different rows."""
    return features[torch.randperm(len(features), generator=generator, device=features.device)[:clusters]]


def _spread_rows(features: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """K rows, each drawn with a chance that grows with its squared distance to those before it (k-means++)."""
    chosen = features.new_empty(clusters, features.shape[1])
    distances = features.new_ones(len(features))
    for k in range(clusters):
        # The first of E alarms that ring at these rates: a draw by weight without a sum, which GPUs do not repeat.
        alarms = torch.empty_like(distances).exponential_(generator=generator) / distances
        chosen[k] = features[alarms.argmin()]
        to_chosen = (features - chosen[k]).square().sum(dim=1)
        distances = to_chosen if k == 0 else torch.minimum(distances, to_chosen)
    return chosen


def _nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row, [E]; ||x||^2 is the same for all of a row's distances and left out."""
    lengths = centroids.square().sum(dim=1)
    parts = features.split(max(1, DISTANCES_AT_ONCE // len(centroids)))
    return torch.cat([(lengths - 2 * rows @ centroids.T).argmin(dim=1) for rows in parts])


def _fill_empty(features: Tensor, labels: Tensor, centroids: Tensor) -> None:
    """Give every empty cluster one of the rows that are farthest from their centroid, in place."""
    counts = labels.bincount(minlength=len(centroids))
    empty = (counts == 0).nonzero()[:, 0]
    if not len(empty):
        return
    distances = _squared_distances(features, labels, centroids)
    order = distances.argsort(descending=True, stable=True)
    # A row that is the last one of its cluster would only move the hole; so would one that lies on its centroid.
    order = order[(distances[order] > 0) & (_rank_in_cluster(labels[order]) < counts[labels[order]] - 1)]
    taken = order[: len(empty)]
    labels[taken] = empty[: len(taken)]


def _rank_in_cluster(labels: Tensor) -> Tensor:
    """How many rows of its own cluster come before each row, [E]."""
    by_cluster = labels.argsort(stable=True)
    counts = labels.bincount()
    places = torch.arange(len(labels), device=labels.device)
    rank = torch.empty_like(labels)
    rank[by_cluster] = places - (counts.cumsum(0) - counts)[labels[by_cluster]]
    return rank


def _squared_distances(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Of every row to the centroid of its cluster, [E]."""
    return (features - centroids[labels]).square().sum(dim=1)


def _means(features: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The mean of each cluster's members, [K,d]; an empty cluster keeps its centroid."""
    counts = labels.bincount(minlength=len(centroids))
    return torch.where(counts[:, None] > 0, cluster_means(features, labels, len(centroids)), centroids)
