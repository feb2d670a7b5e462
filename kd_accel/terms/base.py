"""What all terms share: a weight, a teacher, a confidence, and which tower is compared with which."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from kd_accel.schedules import Scheduled
from kd_accel.schema import Schema

Tower = Literal["image", "text"]


class Term(Schema):
    """A loss of the student alone."""

    columns: ClassVar[tuple[str, ...]] = ()  # whose unit features of all ranks it compares: student, teacher
    needs_ids: ClassVar[bool] = False  # whether it remembers something per sample id

    weight: Scheduled = 1.0
    """lambda: factor of this term in the total loss, a number or a schedule."""


class DistillationTerm(Term):
    """A term that needs a teacher."""

    teacher: str | None = None
    """Name of the teacher under `teachers`; null: the only one."""
    confidence: bool | Literal["var_shifted", "var", "sigmoid"] = False
    """Weigh every sample by the teacher's confidence alpha in (0, 1): true or var_shifted = 1 + alpha, var = alpha.

    alpha is the teacher's mean probability of the right partner over the global batch; sigmoid is the older form: the
    sigmoid of how hard the sample is for the teacher, in standard deviations of the batch."""


class WholeBatchTerm(DistillationTerm):
    """A term whose formula needs the whole batch at once: one number, computed alike on every rank, never chunked."""

    @field_validator("confidence")
    @classmethod
    def _no_confidence(cls, value: Any) -> Any:
        if value:
            raise ValueError("this term compares the whole batch at once and has no loss per sample: drop confidence")
        return value


class Matched(Schema):
    """Mixin: rows of the student's towers against rows of the teacher's."""

    match: dict[Tower, Tower] = Field({"image": "image", "text": "text"}, min_length=1)
    """Student's tower -> the teacher's tower it learns from; {image: text} teaches the image tower a text model.

    The towers named are averaged."""
