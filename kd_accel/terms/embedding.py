"""Terms that compare a student's embedding with the teacher's of the same sample."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kd_accel.schedules import Scheduled
from kd_accel.terms.base import DistillationTerm, Matched


class _FeatureMSE(DistillationTerm):
    reduction: Literal["mean", "sum"] = "mean"
    """Over the embedding; mean adds the towers (CLIP-KD), sum averages them (uncertainty-aware KD)."""


class FeatureMSE(_FeatureMSE):
    """Squared distance of unit student and teacher features of a sample (FD of CLIP-KD, arXiv 2307.12732)."""

    kind: Literal["feature_mse"] = "feature_mse"


class MaskedFeatureMSE(_FeatureMSE):
    """feature_mse of a student that sees a random quarter of the patches (MFD of CLIP-KD, sec. 3.3).

    The masked view is a second pass of the image tower; CLIP-KD's script feeds it to every term, which is feature_mse
    with student.arch's vision_cfg.patch_dropout.
    """

    kind: Literal["masked_feature_mse"] = "masked_feature_mse"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that are dropped."""


class AugmentedFeature(DistillationTerm):
    """InfoNCE of fused features, normalise(W [student; teacher] + b) of each tower (AFD of CLIP-KD).

    The fusion layer has the student's width and is learned in the objective, with the towers' learning rate.
    """

    kind: Literal["augmented_feature"] = "augmented_feature"
    scale: Literal["student", "own"] = "own"
    """own: a learnable scale of this term (CLIP-KD). student: the student's logit scale."""


class EmbeddingMSE(Matched, DistillationTerm):
    """Squared distance of raw embeddings, mean over the embedding (clip-distillation)."""

    kind: Literal["embedding_mse"] = "embedding_mse"


class EmbeddingL1(Matched, DistillationTerm):
    """Absolute distance of raw embeddings, mean over the embedding (ImageSearchLightningCLIP, clip-distillation)."""

    kind: Literal["embedding_l1"] = "embedding_l1"


class EmbeddingHuber(Matched, DistillationTerm):
    """Huber distance of raw embeddings, mean over the embedding (clip-distillation)."""

    kind: Literal["embedding_huber"] = "embedding_huber"
    delta: float = Field(1.0, gt=0)
    """Where the square becomes a line."""


class EmbeddingCE(Matched, DistillationTerm):
    """Cross entropy of the softmax of raw embeddings: -sum softmax(teacher) log softmax(student)."""

    kind: Literal["embedding_ce"] = "embedding_ce"
    reference: bool = False
    """true: the student passes two softmaxes, as in ImageSearchLightningCLIP."""


class EmbeddingKL(Matched, DistillationTerm):
    """t^2 KL(teacher || student) of the softmax of raw embeddings over t (ImageSearchLightningCLIP)."""

    kind: Literal["embedding_kl"] = "embedding_kl"
    temperature: Scheduled = 4.0
    """t, a number or a schedule; ImageSearchLightningCLIP has {kind: piecewise, values: [4, 2], epochs: [101]}."""
    reference: bool = False
    """true: summed over the batch instead of averaged, as in DistillCLIP, so that it grows with the batch."""


class Cosine(Matched, DistillationTerm):
    """1 - cosine of student's and teacher's embedding (`out_cos` of DistillCLIP)."""

    kind: Literal["cosine"] = "cosine"


class SimReg(Matched, DistillationTerm):
    """Regression of unit features, mean over the embedding (SimReg, arXiv 2201.05131; ProtoRKD's default)."""

    kind: Literal["simreg"] = "simreg"
    distance: Literal["mse", "l1", "smooth_l1"] = "mse"
    """Squared, absolute, or squared near zero and absolute beyond 1."""


class Dino(Matched, DistillationTerm):
    """Cross entropy of embeddings as logits, the teacher's centred and sharpened (DINO, arXiv 2104.14294, eq. 2, 4)."""

    kind: Literal["dino"] = "dino"
    teacher_temperature: float = Field(0.04, gt=0)
    """Of the centred teacher."""
    student_temperature: float = Field(0.1, gt=0)
    """Of the student."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the centre, a running mean of the teacher's embeddings."""


class ProtoCPC(Matched, DistillationTerm):
    """Contrast of prototypes under a running prior (ProtoCPC, as in ProtoRKD)."""

    kind: Literal["proto_cpc"] = "proto_cpc"
    teacher_temperature: float = Field(0.04, gt=0)
    """Of the teacher."""
    student_temperature: float = Field(0.1, gt=0)
    """Of the student."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of the prior, a running mean of the teacher's distributions."""
