"""The keys of `kd-accel report`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from kd_accel.schema import Schema


class ReportConfig(Schema):
    """kd-accel report RUN [RUN ...]: one self-contained report.html with curves and the evaluation table."""

    positional: ClassVar[str] = "runs"
    runs: list[str] = Field(min_length=1)
    """Run directories, side by side in the report."""
    output: str | None = None
    """File to write; null: report.html in the first run."""
