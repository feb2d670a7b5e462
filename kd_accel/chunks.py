"""The features of one step, and a few rows of them at a time against everybody's columns.

Letters: b rows of this rank, c rows of one chunk, B rows of all ranks, d embedding width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from kd_accel import distributed
from kd_accel.losses import contrastive
from kd_accel.types import Features

Pair = tuple[Tensor, Tensor]  # of image rows, of caption rows


class Step:
    """The features of one step: this rank's rows, everybody's columns, and where their gradients add up."""

    def __init__(self, student: dict[str, Tensor], teacher: dict[str, Tensor]):
        self.student = {name: rows.detach() for name, rows in student.items()}  # [b, d]
        self.teacher = {name: rows.detach() for name, rows in teacher.items()}
        columns = distributed.gather_rows(
            {f"student.{name}": self.student[name] for name in ("image", "text")}
            | {f"teacher.{name}": rows for name, rows in self.teacher.items()}
        )
        self.student_columns = {
            name: columns[f"student.{name}"].requires_grad_() for name in ("image", "text")
        }  # [B, d]
        self.teacher_columns = {name: columns[f"teacher.{name}"] for name in self.teacher}
        self.num_rows, self.num_columns = len(self.student["image"]), len(columns["student.image"])
        self.offset = distributed.rank() * self.num_rows  # the column of this rank's row 0
        # What adds up chunk by chunk.
        self.row_gradients = {name: torch.zeros_like(rows) for name, rows in self.student.items()}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add a chunk's values, [c] or [], to the metric `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + values.detach().sum()

    def collect(self, chunk: Chunk) -> None:
        """Add what a chunk's backward left on its rows; on the columns autograd adds by itself."""
        for name, leaf in chunk.leaves.items():
            if leaf.grad is not None:
                self.row_gradients[name][chunk.rows] += leaf.grad

    def column_gradients(self) -> list[Tensor]:
        """d loss / d columns as this rank's rows see it, [B, d] for image and text."""
        columns = self.student_columns.values()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in columns]

    def own_gradients(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """d loss / d unit features of this rank, [b, d]: as rows here, and as columns of all ranks ([B, d], summed)."""
        own = slice(self.offset, self.offset + self.num_rows)
        self.row_gradients["image"] += image[own]
        self.row_gradients["text"] += text[own]
        return self.row_gradients

    def non_finite_inputs(self) -> list[str]:
        """Names of this rank's features that hold an inf or a nan."""
        named = {"student": self.student, "teacher": self.teacher}
        return [f"{who} {name}" for who, f in named.items() for name in f if not torch.isfinite(f[name]).all()]


class Chunk:
    """A few rows of this rank against everybody's columns; similarities are made once and shared by the terms."""

    def __init__(self, step: Step, rows: slice, scale: Tensor, bias: Tensor | None, teacher_scale: float):
        self.rows, self.offset = rows, step.offset + rows.start  # offset: the column of the chunk's row 0
        self.scale, self.bias, self.teacher_scale = scale, bias, teacher_scale
        self.leaves = {name: features[rows].requires_grad_() for name, features in step.student.items()}
        self.student = _features(self.leaves, step.student_columns)
        if step.teacher:
            self.teacher = _features({name: f[rows] for name, f in step.teacher.items()}, step.teacher_columns)

    @property
    def projected(self) -> Pair:
        """The student's rows in the teacher's space: (image, text), [c, d_teacher] each."""
        return tuple(self.leaves.get(f"projected_{name}", self.leaves[name]) for name in ("image", "text"))

    @cached_property
    def student_logits(self) -> Pair:
        """(image to text, text to image), [c, B] each."""
        return _against(self.student, self.scale)

    @cached_property
    def teacher_cosines(self) -> Pair:
        """The teacher's own similarities, before its scale, [c, B] each."""
        return _against(self.teacher, 1.0)

    def cross_logits(self, scale: Tensor) -> Pair:
        """Student images against teacher captions and student captions against teacher images, [c, B] each."""
        image, text = self.projected
        return _against(Features(image, text, self.teacher.all_image, self.teacher.all_text), scale)

    @cached_property
    def confidence(self) -> Tensor:
        """alpha_i: the mean of the teacher's two probabilities of the right partner over the global batch, [c]."""
        return mean(
            *(contrastive.partner_probability(self.teacher_scale * z, self.offset) for z in self.teacher_cosines)
        )


def _features(rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Features:
    return Features(rows["image"], rows["text"], columns["image"], columns["text"])


def _against(features: Features, scale: Tensor | float) -> Pair:
    """(image to text, text to image) logits of the rows against everyone's columns, [c, B] each."""
    image = contrastive.similarity_logits(features.image, features.all_text, scale)
    return image, contrastive.similarity_logits(features.text, features.all_image, scale)


def mean(first: Tensor, second: Tensor) -> Tensor:
    return (first + second) / 2
