"""What a YAML file may say of each loss term. The formulas are in losses/, bindings.py brings the two together.

A term gives one number per row; the objective weighs, averages and sums them:

    L = sum_k  weight_k(t) * mean_i  c_k,i * l_k(i)
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kd_accel.terms.base import DistillationTerm, Matched, Term, WholeBatchTerm
from kd_accel.terms.contrastive import (
    Clip,
    GlobalContrastive,
    HardLabel,
    IndividualTemperature,
    LabelCE,
    NetworkTemperature,
    SigLip,
)
from kd_accel.terms.distillation import (
    Affinity,
    CosDiff,
    CrossKL,
    Dist,
    Gradient,
    InteractiveContrastive,
    LogitKL,
    LogitMSE,
    MobileClip,
    SoftLabel,
)
from kd_accel.terms.embedding import (
    AugmentedFeature,
    Cosine,
    Dino,
    EmbeddingCE,
    EmbeddingHuber,
    EmbeddingKL,
    EmbeddingL1,
    EmbeddingMSE,
    FeatureMSE,
    MaskedFeatureMSE,
    ProtoCPC,
    SimReg,
)
from kd_accel.terms.questions import check_teachers, confidence_of, has_own_scale, teachers_read
from kd_accel.terms.relational import RKD, Barlow, Compress, Prototype, Seed, VICReg

AnyTerm = Annotated[
    Clip
    | HardLabel
    | SigLip
    | GlobalContrastive
    | LabelCE
    | LogitKL
    | Affinity
    | Dist
    | MobileClip
    | SoftLabel
    | LogitMSE
    | CosDiff
    | InteractiveContrastive
    | CrossKL
    | Gradient
    | FeatureMSE
    | MaskedFeatureMSE
    | AugmentedFeature
    | EmbeddingMSE
    | EmbeddingL1
    | EmbeddingHuber
    | EmbeddingCE
    | EmbeddingKL
    | Cosine
    | SimReg
    | Dino
    | ProtoCPC
    | RKD
    | Compress
    | Seed
    | VICReg
    | Barlow
    | Prototype,
    Field(discriminator="kind"),
]

__all__ = [
    "RKD",
    "Affinity",
    "AnyTerm",
    "AugmentedFeature",
    "Barlow",
    "Clip",
    "Compress",
    "CosDiff",
    "Cosine",
    "CrossKL",
    "Dino",
    "Dist",
    "DistillationTerm",
    "EmbeddingCE",
    "EmbeddingHuber",
    "EmbeddingKL",
    "EmbeddingL1",
    "EmbeddingMSE",
    "FeatureMSE",
    "GlobalContrastive",
    "Gradient",
    "HardLabel",
    "IndividualTemperature",
    "InteractiveContrastive",
    "LabelCE",
    "LogitKL",
    "LogitMSE",
    "MaskedFeatureMSE",
    "Matched",
    "MobileClip",
    "NetworkTemperature",
    "ProtoCPC",
    "Prototype",
    "Seed",
    "SigLip",
    "SimReg",
    "SoftLabel",
    "Term",
    "VICReg",
    "WholeBatchTerm",
    "check_teachers",
    "confidence_of",
    "has_own_scale",
    "teachers_read",
]
