"""Terms that remember or learn something of their own: queues, running means, clusters, a fusion layer.

Each is a module with the same few methods, which the objective calls in this order:

    derive(student, teachers, progress)   leaves made from this rank's features, with a graph
    prepare(step, progress)               look up what this step needs
    rows(chunk, scale)                    one number per row, [c]; notes what is to be remembered
    commit(ids, noted)                    remember what all ranks noted; only when the engine took its step

b rows of this rank, c rows of a chunk, B rows of all ranks, d width, K queue length or clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.chunks import CONTRASTED, Chunk, Pair, Step, mean
from kd_accel.losses import contrastive, embedding, prototypes, relational
from kd_accel.memory import FeatureQueue, Prototypes, RunningMean
from kd_accel.schedules import Progress
from kd_accel.terms import AugmentedFeature, Compress, Dino, ProtoCPC, Prototype, Seed

Rows = dict[str, Tensor]  # features of this rank by name: unit rows, and `raw.` ones


class Recall(nn.Module):
    """What such a term does where it says nothing else."""

    columns: tuple[str, ...] = ()  # derived leaves that are to be gathered

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        return {}

    def prepare(self, step: Step, progress: Progress) -> None:
        pass

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        pass


class Queues(Recall):
    """compress and seed: similarities to samples of earlier batches, first in, first out.

    queues      "teacher_image", "student_image", ...: by whose features and by the student's tower
    """

    def __init__(self, name: str, term: Compress | Seed, *, widths: dict[str, int], teacher_width: int):
        super().__init__()
        self.name, self.term = name, term
        self.two = isinstance(term, Compress) and term.queues == "2q"
        widths = {
            **{f"teacher_{tower}": teacher_width for tower in term.match},
            **({f"student_{tower}": teacher_space(widths, tower) for tower in term.match} if self.two else {}),
        }
        self.queues = nn.ModuleDict(
            {key: FeatureQueue(term.queue_size, width, seed=i) for i, (key, width) in enumerate(sorted(widths.items()))}
        )

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
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
        for key, rows in noted.items():
            self.queues[key].push(rows)


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
        losses = [self._pair(chunk, ours, theirs) for ours, theirs in self.term.match.items()]
        return sum(losses) / len(losses)

    def _pair(self, chunk: Chunk, ours: str, theirs: str) -> Tensor:
        rows, targets = chunk.raw(ours), chunk.teacher_rows(self.term.teacher, f"raw.{theirs}")
        temperatures = self.term.student_temperature, self.term.teacher_temperature
        if isinstance(self.term, Dino):
            return embedding.centered_cross_entropy(rows, targets, self.means[ours].value, *temperatures)
        return embedding.prototype_cpc(rows, targets, self._next[ours], *temperatures)

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        for tower, value in self._next.items():
            self.means[tower].set(value)


class Clusters(Recall):
    """prototype: this episode's clusters, which episodes.py sets, and the cluster of every sample.

    clusters    a Prototypes
    """

    def __init__(self, name: str, term: Prototype, *, num_ids: int, widths: dict[str, int], target_width: int | None):
        super().__init__()
        self.name, self.term = name, term
        student = {tower: widths.get(f"prototype_{tower}", widths[tower]) for tower in term.match}
        targets = {ours: target_width or student_width(widths, theirs) for ours, theirs in term.match.items()}
        self.clusters = Prototypes(num_ids, term.clusters, student_width=student, target_width=targets)

    def prepare(self, step: Step, progress: Progress) -> None:
        self._ids = step.ids

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        losses = [self._tower(chunk, tower, scale) for tower in self.term.match]
        return sum(losses) / len(losses)

    def _tower(self, chunk: Chunk, tower: str, scale: Tensor) -> Tensor:
        rows = chunk.leaves.get(f"prototype_{tower}", chunk.leaves[tower])
        labels = self.clusters.labels_of(tower, self._ids[chunk.rows])
        centroids, targets = self.clusters.centroids_of(tower)
        return prototypes.prototype_contrast(rows, centroids, labels, targets, scale, self.term.target_temperature)


def teacher_space(widths: dict[str, int], tower: str) -> int:
    """Width of the student's features that are compared with a teacher's: the projector's, where there is one."""
    return widths.get(f"projected_{tower}", widths[tower])


def student_width(widths: dict[str, int], tower: str) -> int:
    """Of the features that are clustered: the prototype head's, or the tower's."""
    return widths.get(f"prototype_{tower}", widths[tower])


class Fusion(Recall):
    """augmented_feature: a layer per tower over [student; teacher], of the student's width."""

    def __init__(self, name: str, term: AugmentedFeature, *, widths: dict[str, int], teacher_width: int):
        super().__init__()
        self.name, self.term = name, term
        self.layers = nn.ModuleDict(
            {tower: nn.Linear(teacher_space(widths, tower) + teacher_width, widths[tower]) for tower in CONTRASTED}
        )
        self.columns = tuple(f"fused.{name}.{tower}" for tower in CONTRASTED)

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        teacher = teachers[self.term.teacher or next(iter(teachers))]
        pairs = {
            tower: torch.cat([student.get(f"projected_{tower}", student[tower]), teacher[tower]], dim=1)
            for tower in CONTRASTED
        }
        fused = [F.normalize(self.layers[tower](pair), dim=1) for tower, pair in pairs.items()]
        return dict(zip(self.columns, fused, strict=True))

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        image, text = self.columns
        logits: Pair = tuple(
            contrastive.similarity_logits(chunk.leaves[ours], chunk.step.columns[theirs], scale)
            for ours, theirs in ((image, text), (text, image))
        )
        return mean(*(contrastive.info_nce(z, chunk.offset) for z in logits))
