"""What is evaluated, on what, and what is measured: the schema of `kd-accel eval`. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from kd_accel.probe_config import ProbeConfig
from kd_accel.schema import Schema


class MeasureConfig(Schema):
    """What is measured of a model, whoever asks for it."""

    tasks: list[str] = []
    """Names of tasks and suites: imagenet, imagenet_variants, retrieval, vtab, datacomp38, protoclip, coco.

    []: every set that lies in data."""
    data: str | list[str]
    """Folders with evaluation sets: CLIP_benchmark's and DataComp's webdatasets, class folders, COCO, torchvision's."""
    image_from: str | None = None
    """A model whose image tower takes the place of the model's own.

    run: the teacher of the model's run; run:NAME, where it has several."""
    text_from: str | None = None
    """Likewise the text tower; or stored texts: what kd-accel embed prompts=... wrote, or an .npy.

    NAME.npy has its texts in NAME.txt, one per line, text_embeddings.npy in text_prompts.txt."""
    probe: ProbeConfig | None = None
    """A linear probe of every set with labels and a training split."""
    seen_classes: str | None = None
    """File with a class name per line: accuracy of these, of the others, and their harmonic mean."""
    statistics: bool = False
    """Of retrieval sets also the modality gap and similarities within images and texts."""
    clusters: bool = False
    """Of sets with labels also how k-means of the image features agrees with the classes."""
    examples: int = Field(4, ge=0)
    """Queries of each retrieval set, each way, that are kept as pictures for the report."""
    cache: str | None = None
    """Folder of features and classifiers that need not be computed again; null: none."""
    batch_size: int = Field(256, gt=0)
    """Images per process and forward pass."""
    num_workers: int = Field(2, ge=0)
    """Loader processes per process."""

    @model_validator(mode="after")
    def _one_tower_of_its_own(self) -> Self:
        if self.image_from is not None and self.text_from is not None:
            raise ValueError("image_from, text_from: they leave nothing of the model itself: drop one of the two")
        return self


class EvalConfig(MeasureConfig):
    """kd-accel eval RUN_OR_RELEASE data=FOLDER: zero-shot classification and retrieval, on all processes."""

    positional: ClassVar[str] = "model"
    model: str
    """A run (its newest checkpoint), a checkpoint, a release directory, or a folder with meta.json and .onnx files.

    ARCH,PRETRAINED of open_clip; hf/NAME, sentence/NAME, timm/NAME, torchvision/NAME; ssl/LAYOUT,FILE."""
    ensemble: list[str] = []
    """Further models: the mean of all models' cosines counts."""
    teacher: str | None = None
    """A model to compare with, set by set: top-1 predictions, features, CKA. run: the teacher of the run."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the model."""
    output: str | None = None
    """Where the rows go; null: results.jsonl of the run, or beside the release."""
    again: bool = False
    """Evaluate what has a row already, of the same weights, once more."""
    watch: bool = False
    """Evaluate all checkpoints of the run, also those to come, until it is done."""
    interval_s: float = Field(30, gt=0)
    """Seconds between two looks for a new checkpoint."""
    until_step: int | None = Field(None, gt=0)
    """The last step that is waited for; null: the run's last."""
