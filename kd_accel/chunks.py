"""The features of one step, and a few rows of them at a time against everybody's columns.

Features are named as the student names them: `image`, `projected_text`, ... are unit rows, `raw.image`, ... the
embeddings as they came. Letters: b rows of this rank, c rows of one chunk, B rows of all ranks, d embedding width.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.losses import contrastive
from kd_accel.losses.global_contrastive import log_inner
from kd_accel.types import Features, TeacherSpec

Pair = tuple[Tensor, Tensor]  # of image rows, of caption rows
CONTRASTED = ("image", "text")  # unit features that terms compare with all columns


def through_head(head: str, name: str, names: Container[str]) -> str:
    """The name of the student's features behind its head, "projected" or "prototype", where `names` has that.

    through_head("projected", "raw.image", leaves)  # "raw.projected_image", or "raw.image" without a projector
    """
    _, raw, view = name.rpartition("raw.")
    behind = f"{raw}{head}_{view}"
    return behind if behind in names else name


class Step:
    """The features of one step: this rank's rows, everybody's columns, and where their gradients add up.

    rows            of the student, by name: [b, ...] leaves
    columns         of the student, by name: [B, d] leaves
    teachers        by teacher and name: [b, d], no gradient
    teacher_columns by teacher and name: [B, d]
    ids, labels     [b] each, or None
    """

    def __init__(
        self,
        rows: dict[str, Tensor],
        teachers: dict[str, dict[str, Tensor]],
        *,
        specs: dict[str, TeacherSpec],
        columns: list[str],
        teacher_columns: list[tuple[str, str]],
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ):
        """Gather `columns` of the student and `teacher_columns`, (teacher, name) each, in one collective."""
        self.rows = {name: leaf.detach() for name, leaf in rows.items()}
        self.teachers, self.specs, self.ids, self.labels = teachers, specs, ids, labels
        wanted: dict[tuple[str | None, str], Tensor] = {(None, name): self.rows[name] for name in columns}
        wanted |= {(teacher, name): teachers[teacher][name] for teacher, name in teacher_columns}
        gathered = distributed.gather_rows(wanted)
        self.columns = {name: gathered[None, name].requires_grad_() for name in columns}
        self.teacher_columns: dict[str, dict[str, Tensor]] = {teacher: {} for teacher in teachers}
        for teacher, name in teacher_columns:
            self.teacher_columns[teacher][name] = gathered[teacher, name]
        self.num_rows = len(next(iter(self.rows.values())))
        self.num_columns = self.num_rows * distributed.world_size()
        self.offset = distributed.rank() * self.num_rows  # the column of this rank's row 0
        # What adds up chunk by chunk.
        self.row_gradients: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.noted: dict[str, Tensor] = {}
        self.hardness: dict[str, Tensor] = {}  # teacher -> [b], where a term wants it

    def only_teacher(self, name: str | None) -> str:
        """The teacher of that name, or the only one."""
        return name if name is not None else next(iter(self.teachers))

    def chunks(self, size: int) -> list[slice]:
        """This rank's rows, `size` at a time."""
        return [slice(start, min(start + size, self.num_rows)) for start in range(0, self.num_rows, size)]

    def add(self, name: str, values: Tensor) -> None:
        """Add a chunk's values, [c] or [], to the metric `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + values.detach().sum()

    def note(self, name: str, rows: slice, values: Tensor) -> None:
        """Keep a chunk's values, [c] or [c, k], until the step ends."""
        values = values.detach()
        if name not in self.noted:
            self.noted[name] = values.new_zeros(self.num_rows, *values.shape[1:])
        self.noted[name][rows] = values

    def gather_noted(self) -> dict[str, Tensor]:
        """What every rank noted, [B] or [B, k] each, and `ids` [B] if there are any; collective."""
        if not self.noted:
            return {}
        everyone = distributed.gather_rows(self.noted)
        return everyone if self.ids is None else everyone | distributed.gather_rows({"ids": self.ids})

    def collect(self, chunk: Chunk) -> None:
        """Add what a chunk's backward left on its rows; on the columns autograd adds by itself."""
        for name, leaf in chunk.leaves.items():
            if leaf.grad is not None:
                self._gradient(name)[chunk.rows] += leaf.grad

    def column_gradients(self) -> list[Tensor]:
        """d loss / d columns as this rank's rows see it, [B, d] each."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.columns.values()]

    def own_gradients(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """d loss / d this rank's rows: as rows here, and as columns of all ranks ([B, d], summed)."""
        own = slice(self.offset, self.offset + self.num_rows)
        for name, gradient in zip(self.columns, columns, strict=True):
            self._gradient(name).add_(gradient[own])
        return self.row_gradients

    def measure_hardness(self, teacher: str, chunk_rows: int) -> None:
        """How hard each sample is for the teacher: mean_{j != i} exp(z_ij - z_ii), in deviations of the batch.

        Deviations do not ask for the unit, so the hardest sample is 1: at a teacher's scale of 100 the exponentials
        themselves leave fp32 at both ends. Where all samples are equally hard, 0.
        """
        scale = self.specs[teacher].logit_scale
        parts = []
        for rows in self.chunks(chunk_rows):
            logits = _against(_features(self.teachers[teacher], self.teacher_columns[teacher], rows), scale)
            parts.append(torch.logaddexp(*(log_inner(z, self.offset + rows.start) for z in logits)))
        mine = torch.cat(parts)  # [b]
        everyone = distributed.gather_rows({"hardness": mine})["hardness"]  # [B]
        highest = everyone.max()
        mine, everyone = (mine - highest).exp(), (everyone - highest).exp()
        deviation = everyone.std()
        self.hardness[teacher] = (mine - everyone.mean()) / torch.where(deviation == 0, 1.0, deviation)

    def inputs(self) -> dict[str, Tensor]:
        """This rank's features of every model as they came, [b, d] each, by name: "student image", ..."""
        return {
            f"{who} {name.removeprefix('raw.')}": rows
            for who, features in {"student": self.rows, **self.teachers}.items()
            for name, rows in features.items()
            if name.startswith("raw.")
        }

    def _gradient(self, name: str) -> Tensor:
        if name not in self.row_gradients:
            self.row_gradients[name] = torch.zeros_like(self.rows[name])
        return self.row_gradients[name]


class Chunk:
    """A few rows of this rank against everybody's columns; similarities are made once and shared by the terms."""

    def __init__(self, step: Step, rows: slice, scale: Tensor, bias: Tensor | None):
        self.step, self.rows, self.offset = step, rows, step.offset + rows.start  # offset: the column of row 0
        self.scale, self.bias = scale, bias
        self.leaves = {name: features[rows].requires_grad_() for name, features in step.rows.items()}
        self._teacher_cosines: dict[str, Pair] = {}
        self._confidences: dict[str, Tensor] = {}

    # The student ------------------------------------------------------------------------------------------------------

    def unit(self, name: str) -> Tensor:
        """The student's unit rows in the teacher's space: projected where there is a projector, [c, d_teacher]."""
        return self.leaves[through_head("projected", name, self.leaves)]

    def raw(self, name: str) -> Tensor:
        """The student's embeddings in the teacher's space, [c, d_teacher]."""
        return self.leaves[through_head("projected", f"raw.{name}", self.leaves)]

    @cached_property
    def student_logits(self) -> Pair:
        """(image to text, text to image) at the student's temperature, [c, B] each."""
        return self.logits(self.scale)

    @cached_property
    def cosines(self) -> Pair:
        """(image to text, text to image), [c, B] each."""
        return self.logits(1.0)

    def logits(self, scale: Tensor | float) -> Pair:
        """(image to text, text to image) at another scale, [] or [c, 1], [c, B] each."""
        return _against(_features(self.leaves, self.step.columns), scale)

    # The teachers -----------------------------------------------------------------------------------------------------

    def teacher(self, name: str | None) -> Features:
        """Unit rows of the chunk and columns of a teacher (None: the only one)."""
        name = self.step.only_teacher(name)
        return _features(self.step.teachers[name], self.step.teacher_columns[name], self.rows)

    def teacher_rows(self, teacher: str | None, name: str) -> Tensor:
        """A teacher's rows of the chunk by name, unit or `raw.`, [c, d_teacher]."""
        return self.step.teachers[self.step.only_teacher(teacher)][name][self.rows]

    def teacher_scale(self, name: str | None) -> float:
        """A teacher's logit scale."""
        return self.step.specs[self.step.only_teacher(name)].logit_scale

    def teacher_cosines(self, name: str | None) -> Pair:
        """A teacher's own similarities, before its scale, [c, B] each."""
        name = self.step.only_teacher(name)
        if name not in self._teacher_cosines:
            self._teacher_cosines[name] = _against(self.teacher(name), 1.0)
        return self._teacher_cosines[name]

    def teacher_logits(self, name: str | None, temperature: float | None = None) -> Pair:
        """A teacher's similarities at `temperature`, or at its own, [c, B] each."""
        scale = self.teacher_scale(name) if temperature is None else 1 / temperature
        image, text = self.teacher_cosines(name)
        return scale * image, scale * text

    def cross_logits(self, teacher: str | None, scale: Tensor) -> Pair:
        """Student images against teacher captions and student captions against teacher images, [c, B] each."""
        columns = self.teacher(teacher)
        return _against(Features(self.unit("image"), self.unit("text"), columns.all_image, columns.all_text), scale)

    def confidence(self, teacher: str | None) -> Tensor:
        """alpha_i: the mean of the teacher's two probabilities of the right partner over the global batch, [c]."""
        name = self.step.only_teacher(teacher)
        if name not in self._confidences:
            logits = self.teacher_logits(name)
            self._confidences[name] = mean(*(contrastive.partner_probability(z, self.offset) for z in logits))
        return self._confidences[name]

    def coefficient(self, teacher: str | None, form: bool | str) -> Tensor:
        """What a term with this `confidence` multiplies its rows by, [c]."""
        if form == "sigmoid":
            return self.step.hardness[self.step.only_teacher(teacher)][self.rows].sigmoid()
        alpha = self.confidence(teacher)
        return alpha if form == "var" else 1 + alpha


def _features(rows: dict[str, Tensor], columns: dict[str, Tensor], part: slice = slice(None)) -> Features:
    return Features(rows["image"][part], rows["text"][part], columns["image"], columns["text"])


def _against(features: Features, scale: Tensor | float) -> Pair:
    """(image to text, text to image) logits of the rows against everyone's columns, [c, B] each."""
    image = contrastive.similarity_logits(features.image, features.all_text, scale)
    return image, contrastive.similarity_logits(features.text, features.all_image, scale)


def mean(first: Tensor, second: Tensor) -> Tensor:
    """Of both directions, or both towers; number by number."""
    return (first + second) / 2


def named(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit rows of raw features by name, and the rows as they came under `raw.`; class logits have no unit rows."""
    units = {name: F.normalize(rows, dim=1) for name, rows in features.items() if name != "class_logits"}
    return units | {f"raw.{name}": rows for name, rows in features.items()}
