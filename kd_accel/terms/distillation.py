"""Terms that compare how student and teacher relate images and captions: their logits."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from kd_accel.terms.base import DistillationTerm, WholeBatchTerm


class _LogitTerm(DistillationTerm):
    columns: ClassVar[tuple[str, ...]] = ("student", "teacher")

    teacher_temperature: float | None = Field(None, gt=0)
    """Temperature of the teacher's logits; null: teacher.temperature, or the one the teacher was trained to."""


class LogitKL(_LogitTerm):
    """KL(teacher || student) of the image-to-text and text-to-image distributions.

    CRD of CLIP-KD (arXiv 2307.12732, sec. 3.2).
    """

    kind: Literal["logit_kl"] = "logit_kl"


class Affinity(_LogitTerm):
    """Soft cross entropy of the image-to-text and text-to-image distributions.

    Affinity mimicking of TinyCLIP (arXiv 2309.12314, sec. 3.1).
    """

    kind: Literal["affinity"] = "affinity"
    temperature: float | None = Field(None, gt=0)
    """The student's temperature here (TinyCLIP fixes both at 0.02); null: its own learnable one."""


class Dist(_LogitTerm):
    """1 - the correlation of the image-to-text and text-to-image distributions: their order matters, not their scale.

    Inter-class relation of DIST (arXiv 2205.10536).
    """

    kind: Literal["dist"] = "dist"


class MobileClip(DistillationTerm):
    """Soft cross entropy against the mean distribution of several teachers (MobileCLIP, arXiv 2311.17049, sec. 3.2).

    The teachers' distributions are averaged after the softmax, by their weights, each at its own temperature.
    """

    columns: ClassVar[tuple[str, ...]] = ("student", "teacher")
    kind: Literal["mobileclip"] = "mobileclip"
    teachers: list[str] | None = Field(None, min_length=1)
    """Names of the teachers in the ensemble; null: all of them."""
    teacher: None = None
    """Not used: see teachers."""
    confidence: Literal[False] = False
    """Not used: an ensemble has no single teacher whose confidence could weigh a sample."""

    @field_validator("teachers")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a teacher stands in the ensemble twice: raise its weight instead")
        return value


class SoftLabel(DistillationTerm):
    """T^2 KL(teacher || student) of the distributions of cosines over T (`soft_label` of DistillCLIP)."""

    columns: ClassVar[tuple[str, ...]] = ("student", "teacher")
    kind: Literal["soft_label"] = "soft_label"
    temperature: float = Field(4.0, gt=0)
    """T, of both."""
    reference: bool = False
    """true: summed over the batch instead of averaged, as in DistillCLIP, so that it grows with the batch."""


class LogitMSE(DistillationTerm):
    """Squared difference of the cosines of all pairs (`logits_mse` of DistillCLIP)."""

    columns: ClassVar[tuple[str, ...]] = ("student", "teacher")
    kind: Literal["logit_mse"] = "logit_mse"


class CosDiff(DistillationTerm):
    """mean relu(t_ii - s_ii) + mean_{i != j} relu(s_ij - t_ij) of the cosines (`cos_diff` of DistillCLIP)."""

    columns: ClassVar[tuple[str, ...]] = ("student", "teacher")
    kind: Literal["cos_diff"] = "cos_diff"


class CrossTerm(DistillationTerm):
    """Student features against the teacher's of the other tower."""

    columns: ClassVar[tuple[str, ...]] = ("teacher",)
    scale: Literal["student", "own"] = "student"
    """student: the student's logit scale. own: a learnable scale of this term (CLIP-KD)."""


class InteractiveContrastive(CrossTerm):
    """InfoNCE of student images against teacher captions, and the reverse (ICL of CLIP-KD, arXiv 2307.12732)."""

    kind: Literal["interactive_contrastive"] = "interactive_contrastive"


class CrossKL(CrossTerm):
    """KL from the teacher's logits to those of student images against teacher captions, and the reverse.

    In CLIP-KD's code as cross_kd, with weight 0 in its scripts.
    """

    kind: Literal["cross_kl"] = "cross_kl"
    teacher_temperature: float | None = Field(None, gt=0)
    """Temperature of the teacher's logits; null: teacher.temperature, or the one the teacher was trained to."""


class Gradient(WholeBatchTerm):
    """Squared distance of InfoNCE's gradients by student and by teacher features.

    GD of CLIP-KD (arXiv 2307.12732, sec. 3.2).
    """

    kind: Literal["gradient"] = "gradient"
    reference: bool = False
    """true: logits divided by the logit scale instead of multiplied, as the published code calls itself."""
