"""The section `eval` of training: what is measured of the student while it learns, and when. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from kd_accel.eval_config import MeasureConfig


class TrainEvalConfig(MeasureConfig):
    """Evaluation of the student in the middle of training, on all processes; what `eval` says of that checkpoint."""

    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two evaluations; neither this nor every_epochs: at the end alone."""
    every_epochs: int | None = Field(None, gt=0)
    """Epochs between two evaluations, in place of every_steps or beside it."""
    at_end: bool = True
    """Evaluate after the last step too."""

    @model_validator(mode="after")
    def _some_time(self) -> Self:
        if self.every_steps is None and self.every_epochs is None and not self.at_end:
            raise ValueError(
                "at_end=false leaves nothing to do: set every_steps or every_epochs, or drop the section eval"
            )
        return self
