"""prototype: contrast with the clusters of an episode. c rows of a chunk."""

from __future__ import annotations

from torch import Tensor

from kd_accel.chunks import Chunk, Step, through_head
from kd_accel.losses import prototypes
from kd_accel.memory import Prototypes
from kd_accel.recall.base import Recall
from kd_accel.schedules import Progress
from kd_accel.terms import Prototype


class Clusters(Recall):
    """prototype: this episode's clusters, which episodes.py sets, and the cluster of every sample.

    clusters    a Prototypes
    """

    def __init__(
        self,
        name: str,
        term: Prototype,
        *,
        num_ids: int,
        sharded: bool,
        widths: dict[str, int],
        target_width: int | None,
    ):
        super().__init__()
        self.name, self.term = name, term
        student = {tower: student_width(widths, tower) for tower in term.match}
        targets = {ours: target_width or student_width(widths, theirs) for ours, theirs in term.match.items()}
        self.clusters = Prototypes(num_ids, term.clusters, student_width=student, target_width=targets, sharded=sharded)

    def prepare(self, step: Step, progress: Progress) -> None:
        """Look up this step's samples. Raises ValueError for a sample id outside the memory."""
        self._labels = self.clusters.labels_of(step.ids)

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """One number per row, [c]: averaged over the towers; 0 for a sample of no cluster."""
        losses = [self._tower(chunk, tower, scale) for tower in self.term.match]
        return sum(losses) / len(losses)

    def _tower(self, chunk: Chunk, tower: str, scale: Tensor) -> Tensor:
        rows = chunk.leaves[through_head("prototype", tower, chunk.leaves)]
        centroids, targets = self.clusters.centroids_of(tower)
        labels = self._labels[tower][chunk.rows]
        return prototypes.prototype_contrast(rows, centroids, labels, targets, scale, self.term.target_temperature)


def student_width(widths: dict[str, int], tower: str) -> int:
    """Of the features that are clustered: the prototype head's, or the tower's."""
    return widths[through_head("prototype", tower, widths)]
