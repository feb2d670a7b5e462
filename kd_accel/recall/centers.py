"""dino and proto_cpc: a running mean of what the teacher says. b, c rows of a rank and of a chunk, d width."""

from __future__ import annotations

from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.chunks import Chunk, Step
from kd_accel.losses import embedding
from kd_accel.memory import RunningMean
from kd_accel.recall.base import Recall, Rows
from kd_accel.schedules import Progress
from kd_accel.terms import Dino, ProtoCPC


class Centers(Recall):
    """dino and proto_cpc: a running mean of what the teacher says.

    means       by the student's tower: of the teacher's embeddings (dino), of its distributions (proto_cpc)
    """

    def __init__(self, name: str, term: Dino | ProtoCPC, *, width: int):
        super().__init__()
        self.name, self.term = name, term
        initial = 0.0 if isinstance(term, Dino) else 1.0
        self.means = nn.ModuleDict(
            {tower: RunningMean(width, initial=initial, momentum=term.momentum) for tower in term.match}
        )

    def prepare(self, step: Step, progress: Progress) -> None:
        """The means of this global batch; dino compares with the running mean before it, proto_cpc with that after."""
        said = [self._said(step, theirs) for theirs in self.term.match.values()]
        sums = distributed.sum_over_ranks([rows.sum(dim=0) for rows in said])
        self._next = {
            ours: self.means[ours].moved(total / step.num_columns)
            for ours, total in zip(self.term.match, sums, strict=True)
        }

    def _said(self, step: Step, theirs: str) -> Tensor:
        """What is averaged, [b, d]: embeddings, or d times the distribution they stand for."""
        targets = step.teachers[step.only_teacher(self.term.teacher)][f"raw.{theirs}"]
        if isinstance(self.term, Dino):
            return targets
        return targets.shape[1] * embedding.teacher_probabilities(targets, self.term.teacher_temperature)

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """One number per row, [c]: averaged over the towers that are matched."""
        losses = [self._pair(chunk, ours, theirs) for ours, theirs in self.term.match.items()]
        return sum(losses) / len(losses)

    def _pair(self, chunk: Chunk, ours: str, theirs: str) -> Tensor:
        rows, targets = chunk.raw(ours), chunk.teacher_rows(self.term.teacher, f"raw.{theirs}")
        temperatures = self.term.student_temperature, self.term.teacher_temperature
        if isinstance(self.term, Dino):
            return embedding.centered_cross_entropy(rows, targets, self.means[ours].value, *temperatures)
        return embedding.prototype_cpc(rows, targets, self._next[ours], *temperatures)

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        """Move the running means, [d] each, on over this global batch."""
        for tower, value in self._next.items():
            self.means[tower].set(value)
