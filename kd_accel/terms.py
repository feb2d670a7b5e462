"""What a YAML file may say of each loss term. The formulas are in losses/, objective.py brings the two together.

A term gives one number per row; the objective weighs, averages and sums them:

    L = sum_k  weight_k(t) * mean_i (1 + c_k * alpha_i) * l_k(i)
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kd_accel.schedules import Scheduled
from kd_accel.schema import Schema


class Term(Schema):
    weight: Scheduled = 1.0
    """lambda: factor of this term in the total loss, a number or a schedule."""


class DistillationTerm(Term):
    """A term that needs a teacher."""

    confidence: bool | Literal["var_shifted", "var"] = False
    """Weigh every sample by the teacher's confidence alpha in (0, 1): true or var_shifted = 1 + alpha, var = alpha."""


class Clip(Term):
    """InfoNCE between the student's images and captions (CLIP, arXiv 2103.00020, fig. 3)."""

    kind: Literal["clip"] = "clip"


class SigLip(Term):
    """Pairwise sigmoid loss of the student's images and captions (SigLIP, arXiv 2303.15343, alg. 1).

    Needs objective.logit_bias (the paper starts at -10, with temperature 0.1).
    """

    kind: Literal["siglip"] = "siglip"


class FeatureMSE(DistillationTerm):
    """Squared distance of student and teacher features of the same sample (FD of CLIP-KD, arXiv 2307.12732, eq. 6)."""

    kind: Literal["feature_mse"] = "feature_mse"
    reduction: Literal["mean", "sum"] = "mean"
    """Over the embedding; mean adds the towers (CLIP-KD), sum averages them (uncertainty-aware KD)."""


class LogitKL(DistillationTerm):
    """KL(teacher || student) of the image-to-text and text-to-image distributions (CRD of CLIP-KD, eq. 5)."""

    kind: Literal["logit_kl"] = "logit_kl"
    teacher_temperature: float | None = Field(None, gt=0)
    """Temperature of the teacher's logits; null: the one the teacher was trained to."""


class InteractiveContrastive(DistillationTerm):
    """InfoNCE of student images against teacher captions, and the reverse (ICL of CLIP-KD, arXiv 2307.12732, eq. 9)."""

    kind: Literal["interactive_contrastive"] = "interactive_contrastive"
    scale: Literal["student", "own"] = "student"
    """student: the student's logit scale (uncertainty-aware KD). own: a learnable scale of this term (CLIP-KD)."""


AnyTerm = Annotated[Clip | SigLip | FeatureMSE | LogitKL | InteractiveContrastive, Field(discriminator="kind")]
