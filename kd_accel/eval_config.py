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
    """A run (its newest checkpoint), a checkpoint, a release directory, or a folder with meta.json and .onnx files.

    ARCH,PRETRAINED of open_clip; hf/NAME, sentence/NAME, timm/NAME, torchvision/NAME; ssl/LAYOUT,FILE."""
    image_from: str | None = None
    """A model whose image tower takes the place of the model's; run: its run's teacher (run:NAME where there are several)."""
    text_from: str | None = None
    """Likewise the text tower, or stored texts: an .npy with its texts in a .txt, or what kd-accel embed prompts=... made."""
    ensemble: list[str] = []
    """Further models: the mean of all models' cosines counts."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the model."""
    output: str | None = None
    """Where the rows go; null: results.jsonl of the run, or beside the release."""
