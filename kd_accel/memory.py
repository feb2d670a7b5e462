"""What losses remember between steps: numbers by sample id, queues of features, running means, clusters.

All of it lies in registered buffers, so it moves, casts and is saved by name. Every rank makes the same calls with the
rows of all ranks, so every rank holds the same; nothing here talks to other ranks. B rows of all ranks, N sample ids,
K queue length or clusters, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SampleMemory(nn.Module):
    """A few numbers per sample id: one [N] fp32 buffer per column."""

    def __init__(self, num_ids: int, columns: dict[str, float]):
        """`columns`: name -> what every sample starts with."""
        super().__init__()
        self.num_ids, self.columns = num_ids, tuple(columns)
        for name, initial in columns.items():
            self.register_buffer(name, torch.full((num_ids,), float(initial)))

    def check(self, ids: Tensor) -> None:
        """Raises ValueError for an id that has no place here."""
        outside = ids[(ids < 0) | (ids >= self.num_ids)]
        if len(outside):
            raise ValueError(
                f"sample id {outside[0].item()} is outside the memory of {self.num_ids} samples: index the shards anew"
                " (kd-accel index), and start a new run (name=OTHER)"
            )

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """[b] ids -> [b] per column."""
        return {name: getattr(self, name)[ids] for name in self.columns}

    @torch.no_grad()
    def write(self, ids: Tensor, values: dict[str, Tensor]) -> None:
        """[B] ids, [B] per column; of several rows with one id the last counts, on every device."""
        last = _last_of_each(ids)
        for name, rows in values.items():
            column = getattr(self, name)
            column[ids[last]] = rows[last].to(column.dtype)


def _last_of_each(ids: Tensor) -> Tensor:
    """Positions of the last occurrence of every id; an indexed write with repeated ids would pick any of them."""
    order = torch.argsort(ids, stable=True)
    ordered = ids[order]
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last]


class FeatureQueue(nn.Module):
    """The last K rows, first in, first out: a ring, as in CompRess and SEED; starts as random unit rows, as in SEED."""

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
    """

    def __init__(self, num_ids: int, clusters: int, *, student_width: dict[str, int], target_width: dict[str, int]):
        super().__init__()
        self.register_buffer("started", torch.tensor(-1))
        for tower, width in student_width.items():
            self.register_buffer(f"labels_{tower}", torch.full((num_ids,), -1, dtype=torch.int32))  # [N]
            self.register_buffer(f"centroids_{tower}", torch.zeros(clusters, width))  # [K, d_student]
            self.register_buffer(f"targets_{tower}", torch.zeros(clusters, target_width[tower]))  # [K, d_target]

    def widths_of(self, tower: str) -> tuple[int, int]:
        """(student's, targets')."""
        return tuple(rows.shape[1] for rows in self.centroids_of(tower))

    def centroids_of(self, tower: str) -> tuple[Tensor, Tensor]:
        """([K, d_student], [K, d_target])."""
        return getattr(self, f"centroids_{tower}"), getattr(self, f"targets_{tower}")

    def labels_of(self, tower: str, ids: Tensor) -> Tensor:
        """[b] ids -> [b] int64 clusters, -1 for samples that are in no episode."""
        return getattr(self, f"labels_{tower}")[ids].long()

    @torch.no_grad()
    def set(self, tower: str, *, ids: Tensor, labels: Tensor, centroids: Tensor, target_centroids: Tensor) -> None:
        """A new episode: [E] ids and clusters, [K, d] centroids, on any device; every other sample is in none.

        Of several rows with one id the last counts.
        """
        places, last = getattr(self, f"labels_{tower}"), _last_of_each(ids)
        places.fill_(-1)
        places[ids[last].to(places.device)] = labels[last].to(places)
        for kept, rows in zip(self.centroids_of(tower), (centroids, target_centroids), strict=True):
            kept.copy_(rows)
