"""compress and seed: similarities to samples of earlier batches. c rows of a chunk, K places, d width."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel.chunks import Chunk, through_head
from kd_accel.losses import relational
from kd_accel.memory import FeatureQueue
from kd_accel.recall.base import Recall, Rows
from kd_accel.terms import Compress, Seed


class Queues(Recall):
    """compress and seed: similarities to samples of earlier batches, first in, first out.

    queues      "teacher_image", "student_image", ...: by whose features and by the student's tower
    """

    def __init__(self, name: str, term: Compress | Seed, *, widths: dict[str, int], teacher_width: int):
        super().__init__()
        self.name, self.term = name, term
        self.two = isinstance(term, Compress) and term.queues == "2q"
        width_of = {f"teacher_{tower}": teacher_width for tower in term.match}
        if self.two:
            width_of |= {f"student_{tower}": widths[through_head("projected", tower, widths)] for tower in term.match}
        self.queues = nn.ModuleDict(
            {key: FeatureQueue(term.queue_size, width_of[key], seed=i) for i, key in enumerate(sorted(width_of))}
        )

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """One number per row, [c]: averaged over the towers that are matched."""
        losses = [self._pair(chunk, ours, theirs) for ours, theirs in self.term.match.items()]
        return sum(losses) / len(losses)

    def _pair(self, chunk: Chunk, ours: str, theirs: str) -> Tensor:
        rows, targets = chunk.unit(ours), chunk.teacher_rows(self.term.teacher, theirs)
        chunk.step.note(f"{self.name}.teacher_{ours}", chunk.rows, targets)
        if self.two:
            chunk.step.note(f"{self.name}.student_{ours}", chunk.rows, rows)
        queue = self.queues[f"teacher_{ours}"].features
        if isinstance(self.term, Seed):
            return relational.seed(rows, targets, queue, self.term.temperature, self.term.teacher_temperature)
        own_queue = self.queues[f"student_{ours}"].features if self.two else queue
        return relational.compress(rows, targets, own_queue, queue, self.term.temperature)

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        """Push all ranks' unit rows, [B, d] by queue."""
        for key, rows in noted.items():
            self.queues[key].push(rows)
