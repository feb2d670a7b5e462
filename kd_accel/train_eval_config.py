"""The section `eval` of training: what is measured of the student while it learns, and when. Imports no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from kd_accel.eval_config import MeasureConfig


class TrainEvalConfig(MeasureConfig):
    """Evaluation of the student in the middle of training, on all processes; what `eval` says of that checkpoint."""

    every_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two evaluations; null: at the end alone."""
    at_end: bool = True
    """Evaluate after the last step too."""

    @model_validator(mode="after")
    def _some_time(self):
        if self.every_steps is None and not self.at_end:
            raise ValueError("at_end=false leaves nothing to do: set every_steps, or drop the section eval")
        return self
