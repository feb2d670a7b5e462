"""What is evaluated, on what, and what is measured: the schema of `kd-accel eval`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kd_accel.schema import Schema


class MeasureConfig(Schema):
    """What is measured of a model, whoever asks for it."""

    tasks: list[str] = []
    """Names of tasks and suites (imagenet, imagenet_variants, retrieval, vtab, datacomp38, protoclip, coco).

    []: every set that lies in data."""
    data: str | list[str]
    """Folders with evaluation sets: CLIP_benchmark's and DataComp's webdatasets, class folders, COCO, torchvision's."""
    batch_size: int = Field(256, gt=0)
    """Images per process and forward pass."""
    num_workers: int = Field(2, ge=0)
    """Loader processes per process."""


class EvalConfig(MeasureConfig):
    """kd-accel eval RUN_OR_RELEASE data=FOLDER: zero-shot classification and retrieval, on all processes."""

    positional: ClassVar[str] = "model"
    model: str
    """A run (its newest checkpoint), a checkpoint, or a release directory."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the model."""
    output: str | None = None
    """Where the rows go; null: results.jsonl of the run, or beside the release."""
