"""augmented_feature: student and teacher fused by a learned layer. b, c rows of a rank and of a chunk."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.chunks import CONTRASTED, Chunk, mean, through_head
from kd_accel.losses import contrastive
from kd_accel.recall.base import Recall, Rows
from kd_accel.schedules import Progress
from kd_accel.terms import AugmentedFeature


class Fusion(Recall):
    """augmented_feature: a layer per tower over [student; teacher], of the student's width."""

    def __init__(self, name: str, term: AugmentedFeature, *, widths: dict[str, int], teacher_width: int):
        super().__init__()
        self.name, self.term = name, term
        projected = {tower: widths[through_head("projected", tower, widths)] for tower in CONTRASTED}
        self.layers = nn.ModuleDict(
            {tower: nn.Linear(projected[tower] + teacher_width, widths[tower]) for tower in CONTRASTED}
        )
        self.columns = tuple(f"fused.{name}.{tower}" for tower in CONTRASTED)

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        """Unit fused rows of this rank, [b, d] per tower, d the student's width."""
        teacher = teachers[self.term.teacher or next(iter(teachers))]
        pairs = {
            tower: torch.cat([student[through_head("projected", tower, student)], teacher[tower]], dim=1)
            for tower in CONTRASTED
        }
        fused = [F.normalize(self.layers[tower](pair), dim=1) for tower, pair in pairs.items()]
        return dict(zip(self.columns, fused, strict=True))

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """InfoNCE of the fused rows, both directions averaged, [c]."""
        image, text = self.columns
        logits = tuple(
            contrastive.similarity_logits(chunk.leaves[ours], chunk.step.columns[theirs], scale)
            for ours, theirs in ((image, text), (text, image))
        )
        return mean(*(contrastive.info_nce(z, chunk.offset) for z in logits))
