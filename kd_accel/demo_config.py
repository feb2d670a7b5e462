"""The keys of `kd-accel demo`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kd_accel.schema import Schema


class DemoConfig(Schema):
    """kd-accel demo: the main job on scikit-learn's handwritten digits, two processes, ZeRO-2, bf16."""

    positional: ClassVar[str] = "output_dir"
    output_dir: str = "runs/demo"
    """Where data, runs, release and report go."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds of the student and of the baseline; several give a mean and a deviation."""
