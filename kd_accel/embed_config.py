"""The keys of `kd-accel embed`: those of a training config, and where the features go.

Imports no torch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kd_accel.config import TrainConfig, teachers_of
from kd_accel.terms import check_teachers, teachers_read


class EmbedConfig(TrainConfig):
    """kd-accel embed TRAIN.yaml out=STORE: a teacher's features of every sample, for teacher.placement=cached.

    The file is that of the training to come: its data, augmentation, seed and models decide what is embedded."""

    out: str
    """The store, a directory; with prompts a .safetensors file. A run that was stopped goes on where it was."""
    teacher_name: str | None = None
    """Which one of teachers; null: the only one."""
    towers: list[Literal["image", "text"]] | None = Field(None, min_length=1)
    """Of the teacher; null: those that the terms of the objective read."""
    views: int = Field(1, gt=0)
    """Augmented views of every image: those of the first epochs of the training. Later epochs show them again."""
    dtype: Literal["fp16", "bf16", "int8"] = "fp16"
    """Of a stored number; int8 adds four bytes per row, and is off by at most 1/254 of a row's largest number."""
    embed_batch_size: int = Field(256, gt=0)
    """Views, or texts, per process and forward pass."""
    verify: float = Field(0.001, ge=0, le=1)
    """Share of the samples that the teacher sees again at the end, as training would show them; 0: none."""
    verify_only: bool = False
    """Write nothing, compare what is there."""
    prompts: str | None = None
    """Embed the lines of this file, and nothing else: unit rows for objective.terms.NAME.classes."""
    prompt_templates: list[str] = Field(["{}"], min_length=1)
    """What a line of prompts is put into; its row is the mean over all of them."""
    from_npy: str | None = None
    """Make the store from features of another program: a folder with KEY.npy per sample, or one .npy [samples, d]."""
    to_npy: str | None = None
    """Write what is in the store to such a folder, or such a file (.npy)."""

    @model_validator(mode="after")
    def _teachers_fit_terms(self) -> Self:
        """As in training, but for teachers that no term learns from yet."""
        names, terms = list(teachers_of(self)), self.objective.terms
        if self.teacher is not None and self.teachers:
            raise ValueError("give either teacher or teachers, not both")
        read = {name for term in terms.values() if names for name in teachers_read(term, names)}
        check_teachers(terms, [name for name in names if name in read])
        return self

    @model_validator(mode="after")
    def _one_job(self) -> Self:
        given = {"prompts": self.prompts, "from_npy": self.from_npy, "to_npy": self.to_npy}
        jobs = [key for key, value in given.items() if value is not None] + ["verify_only"] * self.verify_only
        if self.data.loader == "stream":
            raise ValueError("data.loader=stream: features are stored by sample id: set it to indexed")
        if len(jobs) > 1:
            raise ValueError(f"give one of {' and '.join(jobs)}")
        if (self.prompts is not None) != self.out.endswith(".safetensors"):
            raise ValueError(
                f"out={self.out}: prompts need a file .safetensors, everything else the directory of a store"
            )
        if (self.from_npy or self.to_npy) and self.towers and len(self.towers) > 1:
            raise ValueError("towers: files .npy hold the features of one tower")
        return self
