"""The keys of `kd-accel doctor`: how long it waits, and those of the training to come. Imports no torch."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from kd_accel.config import TrainConfig
from kd_accel.schema import Schema, validate


class DoctorConfig(Schema):
    """kd-accel doctor [TRAIN.yaml]: what would keep this training, launched like this, from running.

    Without keys of train, environment and launch alone are looked at."""

    model_config = ConfigDict(extra="allow")

    timeout_s: float = Field(60, gt=0)
    """Seconds that a process waits for the others. All other keys are those of train: kd-accel help train."""

    @model_validator(mode="after")
    def _is_a_training(self) -> Self:
        self.training()
        return self

    def training(self) -> TrainConfig | None:
        """The training that these keys describe; None without any. Raises ConfigError, as train does."""
        return validate(TrainConfig, self.model_extra) if self.model_extra else None
