"""What losses remember between steps: numbers by sample id, queues of features, running means, clusters.

All of it lies in buffers, so it moves and casts with its module. Every rank makes the same calls, writing with the rows
of all ranks: queues, means and centroids are alike on every rank, and so is what is remembered by sample id, unless it
is sharded: then rank r of W holds the ids from r * ceil(N / W) on. What is by sample id is no part of state_dict();
memory_files.py saves it. B rows of all ranks, b of this one, N sample ids, K queue length or clusters, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel import distributed


def own_ids(num_ids: int, *, sharded: bool) -> range:
    """The sample ids that this rank remembers: all, or its ceil(N / W) of them; the last ranks may have fewer."""
    size = -(-num_ids // distributed.world_size()) if sharded else num_ids
    start = min(size * distributed.rank(), num_ids) if sharded else 0
    return range(start, min(start + size, num_ids))


class SampleMemory(nn.Module):
    """A few numbers per sample id: one buffer per column, of this rank's ids alone.

    num_ids, ids    N, and which of them this rank holds
    """

    def __init__(
        self, num_ids: int, columns: dict[str, float], *, sharded: bool = False, dtype: torch.dtype = torch.float32
    ):
        """`columns`: name -> what every sample starts with."""
        super().__init__()
        self.num_ids, self.columns, self.sharded = num_ids, tuple(columns), sharded
        self.ids = own_ids(num_ids, sharded=sharded)
        for name, initial in columns.items():
            self.register_buffer(name, torch.full((len(self.ids),), initial, dtype=dtype), persistent=False)

    def check(self, ids: Tensor) -> None:
        """Raises ValueError for an id that has no place here; with the ids of all ranks, on every rank alike."""
        outside = ids[(ids < 0) | (ids >= self.num_ids)]
        if len(outside):
            raise ValueError(
                f"sample id {outside[0].item()} is outside the memory of {self.num_ids} samples: index the shards anew"
                " (kd-accel index), and start a new run (name=OTHER)"
            )

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """[b] ids -> [b] per column; collective, b is the same on every rank.

        Raises ValueError, on every rank, for an id of any rank that has no place here.
        """
        everyone = distributed.gather_rows({"ids": ids})["ids"]  # [B]
        self.check(everyone)
        if not self.sharded:
            return {name: getattr(self, name)[ids] for name in self.columns}
        places, rows = self._places(everyone)
        found = torch.stack([getattr(self, name)[places] for name in self.columns])
        packed = found.new_zeros(len(self.columns), len(everyone))
        packed[:, rows] = found  # all other ranks add 0, which leaves -inf and nan what they are
        (packed,) = distributed.sum_over_ranks([packed])
        start = distributed.rank() * len(ids)
        return dict(zip(self.columns, packed[:, start : start + len(ids)], strict=True))

    @torch.no_grad()
    def write(self, ids: Tensor, values: dict[str, Tensor]) -> None:
        """[B] ids, [B] per column, alike on every rank, which keeps its own ids.

        Of several rows with one id the last counts, on every device.
        """
        places, rows = self._places(ids)
        last = _last_of_each(places)
        for name, written in values.items():
            column = getattr(self, name)
            column[places[last]] = written[rows[last]].to(column.dtype)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(places in this rank's columns, positions in `ids`) of those ids that this rank holds."""
        rows = ((ids >= self.ids.start) & (ids < self.ids.stop)).nonzero()[:, 0]
        return ids[rows] - self.ids.start, rows


def _last_of_each(ids: Tensor) -> Tensor:
    """Positions of the last occurrence of every id; an indexed write with repeated ids would pick any of them."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last]


class FeatureQueue(nn.Module):
    """The last K rows, first in, first out: a ring, as in CompRess and SEED; starts as random unit rows, as in SEED."""

    features: Tensor
    position: Tensor

    def __init__(self, size: int, width: int, *, seed: int = 0):
        super().__init__()
        rows = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("features", F.normalize(rows, dim=1))  # [K, d]
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))  # of the oldest row

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """[B, d]; the oldest rows go."""
        size = len(self.features)
        rows = rows[-size:]
        places = (self.position + torch.arange(len(rows), device=rows.device)) % size
        self.features[places] = rows.to(self.features.dtype)
        self.position.copy_((self.position + len(rows)) % size)


class RunningMean(nn.Module):
    """value <- momentum * value + (1 - momentum) * mean of the batch."""

    value: Tensor

    def __init__(self, width: int, *, initial: float, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.full((width,), float(initial)))  # [d]

    def moved(self, batch_mean: Tensor) -> Tensor:
        """What the value is after a global batch of this mean, [d]."""
        return self.momentum * self.value + (1 - self.momentum) * batch_mean

    def set(self, value: Tensor) -> None:
        """[d]."""
        self.value.copy_(value)


class Prototypes(nn.Module):
    """The clusters of an episode, by the student's tower, and the cluster of every sample in it.

    started     [] int64: the step at which the episode began, -1 before the first one
    labels      by sample id and tower: the cluster, -1 for none
    """

    def __init__(
        self,
        num_ids: int,
        clusters: int,
        *,
        student_width: dict[str, int],
        target_width: dict[str, int],
        sharded: bool = False,
    ):
        super().__init__()
        self.register_buffer("started", torch.tensor(-1))
        self.labels = SampleMemory(num_ids, dict.fromkeys(student_width, -1), sharded=sharded, dtype=torch.int32)
        for tower, width in student_width.items():
            self.register_buffer(f"centroids_{tower}", torch.zeros(clusters, width))  # [K, d_student]
            self.register_buffer(f"targets_{tower}", torch.zeros(clusters, target_width[tower]))  # [K, d_target]

    def widths_of(self, tower: str) -> tuple[int, int]:
        """(student's, targets')."""
        centroids, targets = self.centroids_of(tower)
        return centroids.shape[1], targets.shape[1]

    def centroids_of(self, tower: str) -> tuple[Tensor, Tensor]:
        """([K, d_student], [K, d_target])."""
        return getattr(self, f"centroids_{tower}"), getattr(self, f"targets_{tower}")

    def labels_of(self, ids: Tensor) -> dict[str, Tensor]:
        """[b] ids -> by tower [b] int64 clusters, -1 for samples that are in no episode; collective."""
        return {tower: labels.long() for tower, labels in self.labels.read(ids).items()}

    @torch.no_grad()
    def set(self, tower: str, *, ids: Tensor, labels: Tensor, centroids: Tensor, target_centroids: Tensor) -> None:
        """A new episode: [E] ids and clusters, [K, d] centroids, on any device; every other sample is in none.

        Of several rows with one id the last counts.
        """
        places = getattr(self.labels, tower).fill_(-1)
        self.labels.write(ids.to(places.device), {tower: labels.to(places.device)})
        for kept, rows in zip(self.centroids_of(tower), (centroids, target_centroids), strict=True):
            kept.copy_(rows)
