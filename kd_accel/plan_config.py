"""The keys of `kd-accel plan`: those of a training config, and what it would run on. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from kd_accel.config import TrainConfig


class PlanConfig(TrainConfig):
    """kd-accel plan TRAIN.yaml devices=8xH100: what a training would cost, before anything is fetched or allocated."""

    devices: str = Field("8xH100", pattern=r"^[1-9]\d*x(A100|H100|H200|L40S|CPU)$")
    """How many processes, and what each of them has: A100, H100, H200, L40S, or CPU (this machine)."""
    mfu: float = Field(0.3, gt=0, le=1)
    """Share of the devices' peak that the models' FLOPs reach; published CLIP trainings: 0.06 to 0.13."""
    samples_per_epoch: int | None = Field(None, gt=0)
    """In place of what the data's index counts, for data that is not there yet."""
    output: str | None = None
    """File for the same numbers as JSON; null: none."""
