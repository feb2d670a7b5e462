"""The keys of `kd-accel train`: its sections in one config, and what of them has to fit each other.

The string below a field is what `kd-accel help train` prints. Imports no torch: `kd-accel config` answers at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kd_accel.data_config import DataConfig, SourceConfig
from kd_accel.push_config import TrainHubConfig
from kd_accel.schema import Schema, without_nulls
from kd_accel.sections import (
    CompressConfig,
    LogConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimConfig,
    SaveConfig,
    StudentConfig,
    TeacherConfig,
)
from kd_accel.terms import LabelCE, MaskedFeatureMSE, check_teachers
from kd_accel.train_eval_config import TrainEvalConfig


class TrainConfig(Schema):
    """kd-accel train: distil a student beside its frozen teacher (or train it alone, without one)."""

    name: str = Field(pattern=r"^[\w][\w.\-]*$")
    """Name of the run; everything it writes goes to output_dir/name."""
    output_dir: str = "runs"
    """Folder of the runs."""
    resume: str = "never"
    """never: refuse to write into an existing run. auto: go on from its newest checkpoint, or start.

    PATH: go on from this checkpoint directory."""
    seed: int = Field(0, ge=0)
    """Decides initial weights, order, augmentation and dropout."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the towers; losses, temperature and optimizer state are fp32 in any case."""
    data: DataConfig
    student: StudentConfig
    teacher: TeacherConfig | None = None
    """null trains the student without distillation."""
    teachers: Annotated[dict[str, TeacherConfig], BeforeValidator(without_nulls)] = {}
    """Several teachers by name, instead of teacher; every term then names its own. null drops one of a base file."""
    objective: ObjectiveConfig
    optim: OptimConfig
    train: LoopConfig = LoopConfig()
    compress: CompressConfig = CompressConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    eval: TrainEvalConfig | None = None
    """Evaluate the student while it learns; null: only the verb eval does."""
    hub: TrainHubConfig | None = None
    """Push checkpoints to the HuggingFace Hub while it learns; null: only the verb push does."""

    @field_validator("teachers")
    @classmethod
    def _names(cls, value: Any) -> Any:
        for name in value:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "student":
                raise ValueError(f"'{name}' cannot name a teacher: small letters, digits and _, and not 'student'")
        return value

    @model_validator(mode="after")
    def _teachers_fit_terms(self) -> Self:
        if self.teacher is not None and self.teachers:
            raise ValueError("give either teacher or teachers, not both")
        check_teachers(self.objective.terms, list(teachers_of(self)))
        return self

    @model_validator(mode="after")
    def _compresses_what_is_trained(self) -> Self:
        if self.student.init is not None or self.student.pretrained is not None:
            return self
        if self.compress.int8:
            raise ValueError(
                "compress.int8 takes ranges from weights and activations, which of an untrained student say nothing:"
                " train it in float first, and give that run as student.init (or student.pretrained)"
            )
        if self.compress.sparsity:
            raise ValueError(
                "compress.sparsity keeps the largest weights, which of an untrained student say nothing: train it dense"
                " first, and give that run as student.init (or student.pretrained)"
            )
        return self

    @model_validator(mode="after")
    def _compiles_what_stays(self) -> Self:
        if self.train.compile and self.compress.int8:
            raise ValueError(
                "train.compile: the rounding of compress.int8 changes while it looks at activations, and compiled"
                " blocks do not: set train.compile to false"
            )
        return self

    @model_validator(mode="after")
    def _graph_fits(self) -> Self:
        """torchao runs a graph of the image tower, not its parts."""
        if self.compress.int8 != "torchao":
            return self
        if self.student.grad_checkpointing:
            raise ValueError("student.grad_checkpointing cannot reach into compress.int8=torchao: set it to false")
        if masked := [n for n, term in self.objective.terms.items() if isinstance(term, MaskedFeatureMSE)]:
            raise ValueError(
                f"objective.terms.{masked[0]} masks patches inside the image tower, into which compress.int8=torchao"
                " does not let it: use compress.int8=modelopt"
            )
        return self

    @model_validator(mode="after")
    def _labels_fit_terms(self) -> Self:
        labelled = [name for name, term in self.objective.terms.items() if isinstance(term, LabelCE)]
        unlabelled = [key for key, source in sources_of(self.data).items() if source.label is None]
        if labelled and unlabelled:
            key = f"{unlabelled[0]}.label"
            raise ValueError(f"objective.terms.{labelled[0]} needs labels: set {key}, for instance to cls")
        return self

    @model_validator(mode="after")
    def _stream_fits_terms(self) -> Self:
        if self.data.loader == "indexed":
            return self
        if remembering := [name for name, term in self.objective.terms.items() if term.needs_ids]:
            raise ValueError(f"objective.terms.{remembering[0]} remembers samples by id: data.loader=stream has none")
        if stored := [name for name, teacher in teachers_of(self).items() if teacher.store is not None]:
            raise ValueError(f"{stored[0]}.store has features by sample id: data.loader=stream has none")
        return self


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Every source by the key of its section: the single one is "data" itself."""
    return {f"data.sources.{name}": source for name, source in data.sources.items()} or {"data": data}


def teachers_of(config: TrainConfig) -> dict[str, TeacherConfig]:
    """Every teacher by its name; the single one is called "teacher"."""
    return config.teachers or ({"teacher": config.teacher} if config.teacher is not None else {})
