"""The keys of `kd-accel bench`: those of a training config, and what is measured. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd_accel.config import TrainConfig


class BenchConfig(TrainConfig):
    """kd-accel bench TRAIN.yaml: some steps of a training, and where their time goes; keeps no run."""

    warmup: int = Field(3, ge=0)
    """Steps that are not counted: memory is allocated, and workers fill their queues."""
    measured: int = Field(20, gt=0)
    """Steps that are."""
    input: Literal["data", "synthetic"] = "data"
    """data: what training would read. synthetic: one random batch again and again, so that nothing is waited for."""
    output: str | None = None
    """File for the numbers as JSON, for tests/benchmarks/compare.py; null: none."""
