"""Numbers that change while a run goes on: Progress -> float.

Every schedule is a pure function of where the run stands, so resume needs no state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

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
    def _one_length(self) -> Self:
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
            assert self.samples is not None
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
        return _half_cosine(self.start, self.end, self.fraction(progress))


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


class StepEvery(Schema):
    """`value`, times `ratio` after every so many epochs (torch's StepLR; TempNet's network has 0.9 per epoch)."""

    kind: Literal["step_every"] = "step_every"
    value: float
    """Value at the beginning."""
    ratio: float = Field(gt=0)
    """Factor of one step."""
    epochs: int = Field(gt=0)
    """Epochs between two steps."""

    def at(self, progress: Progress) -> float:
        return self.value * self.ratio ** (int(progress.epoch) // self.epochs)


class Piecewise(Schema):
    """One value after another: values[0] before epochs[0], values[1] from then until before epochs[1], and so on."""

    kind: Literal["piecewise"] = "piecewise"
    values: list[float] = Field(min_length=2)
    """The values."""
    epochs: list[float] = Field(min_length=1)
    """Epochs at which the next value begins, one fewer than values, rising."""

    @model_validator(mode="after")
    def _boundaries(self) -> Self:
        if len(self.epochs) != len(self.values) - 1 or sorted(set(self.epochs)) != self.epochs:
            raise ValueError(f"{len(self.values)} values need {len(self.values) - 1} rising epochs, not {self.epochs}")
        return self

    def at(self, progress: Progress) -> float:
        return self.values[sum(progress.epoch >= begin for begin in self.epochs)]


def _form(value: Any) -> str:
    return "(schedule)" if isinstance(value, dict | Schema) else "(number)"


Schedule = Annotated[Constant | Linear | Cosine | StepBelow | StepEvery | Piecewise, Field(discriminator="kind")]
# How a config types a number that may move. The tags keep pydantic from reporting the form that was not meant.
Scheduled = Annotated[Annotated[float, Tag("(number)")] | Annotated[Schedule, Tag("(schedule)")], Discriminator(_form)]


def value_at(scheduled: float | Schedule, progress: Progress) -> float:
    """The number that `scheduled` stands for at `progress`."""
    return scheduled.at(progress) if isinstance(scheduled, Schema) else scheduled


def bounds(scheduled: float | Schedule) -> tuple[float, float]:
    """(lowest, highest) value that `scheduled` ever takes; step_every tends to zero or grows without end."""
    match scheduled:
        case Constant():
            values = [scheduled.value]
        case Linear() | Cosine():
            values = [scheduled.start, scheduled.end]
        case StepBelow():
            values = [scheduled.value, scheduled.value * scheduled.ratio]
        case StepEvery():
            values = [
                scheduled.value,
                0.0 if scheduled.ratio < 1 else math.inf if scheduled.ratio > 1 else scheduled.value,
            ]
        case Piecewise():
            values = scheduled.values
        case number:
            values = [number]
    return min(values), max(values)


def warmup_cosine(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of the step after `step` steps: linear warm-up to `lr`, then half a cosine to `min_lr`.

    As in open_clip: step 0 already trains at lr / warmup_steps.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return _half_cosine(lr, min_lr, min(1.0, done))


def warmup_constant(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int, cooldown_steps: int, power: float
) -> float:
    """Learning rate of the step after `step` steps: linear warm-up to `lr`, then `lr`, and at the end a cooldown.

    As in open_clip: the cooldown's steps go to `min_lr` as (1 - done) ** power; 0 of them is a constant rate.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    start = total_steps - cooldown_steps
    if step < start or not cooldown_steps:
        return lr
    return min_lr + (lr - min_lr) * math.pow(1 - (step - start) / cooldown_steps, power)


def one_cycle(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of the step after `step` steps: half a cosine from lr / 25 up to `lr`, then one down to `min_lr`.

    torch's OneCycleLR (arXiv 1708.07120) with its cosine and div_factor; the moments' decays stay as they are.
    """
    rising = max(1, warmup_steps - 1)  # torch reaches the top at step warmup_steps - 1
    if step < rising:
        return _half_cosine(lr / 25, lr, step / rising)
    return _half_cosine(lr, min_lr, min(1.0, (step - rising) / max(1, total_steps - 1 - rising)))


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
