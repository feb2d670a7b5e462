"""Numbers that change while a run goes on: Progress -> float.

Every schedule is a pure function of where the run stands, so resume needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kd_accel.schema import Schema


@dataclass(frozen=True)
class Progress:
    """Where a run stands, before the step that is about to be taken."""

    step: int = 0  # optimizer steps taken
    epoch: float = 0.0  # passes over the data, with its fraction
    samples: int = 0  # samples seen by all ranks
    temperature: float = 1.0  # the student's, 1 / logit_scale


class _Ramp(Schema):
    start: float
    """Value at the beginning."""
    end: float
    """Value at the end and from then on."""
    steps: int | None = Field(None, gt=0)
    """Length in optimizer steps (give one of steps, epochs, samples)."""
    epochs: float | None = Field(None, gt=0)
    """Length in epochs."""
    samples: int | None = Field(None, gt=0)
    """Length in samples, over all processes."""

    @model_validator(mode="after")
    def _one_length(self):
        given = [name for name in ("steps", "epochs", "samples") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give the length as exactly one of steps, epochs, samples, not {len(given)}")
        return self

    def fraction(self, progress: Progress) -> float:
        """How much of the ramp is done, 0..1."""
        if self.steps is not None:
            done = progress.step / self.steps
        elif self.epochs is not None:
            done = progress.epoch / self.epochs
        else:
            done = progress.samples / self.samples
        return min(1.0, max(0.0, done))


class Constant(Schema):
    """The same value for ever; a bare number means the same."""

    kind: Literal["constant"] = "constant"
    value: float
    """The value."""

    def at(self, progress: Progress) -> float:
        return self.value


class Linear(_Ramp):
    """A straight line from start to end."""

    kind: Literal["linear"] = "linear"

    def at(self, progress: Progress) -> float:
        return self.start + (self.end - self.start) * self.fraction(progress)


class Cosine(_Ramp):
    """Half a cosine from start to end."""

    kind: Literal["cosine"] = "cosine"

    def at(self, progress: Progress) -> float:
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * self.fraction(progress))) / 2


class StepBelow(Schema):
    """`value`, times `ratio` while the student's temperature is at most `threshold` (FastCLIP, arXiv 2407.01445)."""

    kind: Literal["step_below"] = "step_below"
    value: float
    """Value above the threshold."""
    threshold: float = Field(gt=0)
    """Temperature at or below which the ratio applies."""
    ratio: float = Field(gt=0)
    """Factor at or below the threshold."""

    def at(self, progress: Progress) -> float:
        return self.value * (self.ratio if progress.temperature <= self.threshold else 1.0)


def _form(value) -> str:
    return "(schedule)" if isinstance(value, dict | Schema) else "(number)"


Schedule = Annotated[Constant | Linear | Cosine | StepBelow, Field(discriminator="kind")]
# How a config types a number that may move. The tags keep pydantic from reporting the form that was not meant.
Scheduled = Annotated[Annotated[float, Tag("(number)")] | Annotated[Schedule, Tag("(schedule)")], Discriminator(_form)]


def value_at(scheduled: float | Schedule, progress: Progress) -> float:
    """The number that `scheduled` stands for at `progress`."""
    return scheduled.at(progress) if isinstance(scheduled, Schema) else scheduled


def warmup_cosine(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of the step after `step` steps: linear warm-up to `lr`, then half a cosine to `min_lr`.

    As in open_clip: step 0 already trains at lr / warmup_steps.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2
