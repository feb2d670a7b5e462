"""Terms that compare how student and teacher relate samples of one tower to each other."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kd_accel.terms.base import DistillationTerm, Matched, Term, Tower, WholeBatchTerm


class RKD(Matched, WholeBatchTerm):
    """Smooth-L1 between all distances and all angles of a batch (RKD, arXiv 1904.05068, sec. 3.2)."""

    kind: Literal["rkd"] = "rkd"
    distance_weight: float = Field(0.5, ge=0)
    """Of the distances (ProtoRKD; the paper has 25)."""
    angle_weight: float = Field(1.0, ge=0)
    """Of the angles (ProtoRKD; the paper has 50)."""


class Compress(Matched, DistillationTerm):
    """KL between the similarities to a queue of earlier samples (CompRess, arXiv 2010.14713)."""

    kind: Literal["compress"] = "compress"
    queues: Literal["1q", "2q"] = "1q"
    """1q: both are compared with the teacher's queue. 2q: each with its own."""
    queue_size: int = Field(65536, gt=0)
    """Samples in the queue."""
    temperature: float = Field(0.04, gt=0)
    """Of both distributions."""


class Seed(Matched, DistillationTerm):
    """Cross entropy of the similarities to the teacher's own feature and to a queue (SEED, arXiv 2101.04731)."""

    kind: Literal["seed"] = "seed"
    queue_size: int = Field(65536, gt=0)
    """Samples in the queue of teacher features."""
    temperature: float = Field(0.07, gt=0)
    """Of the student's distribution."""
    teacher_temperature: float = Field(1e-4, gt=0)
    """Of the teacher's distribution."""


class VICReg(Matched, WholeBatchTerm):
    """Invariance, variance and covariance of student and teacher embeddings (VICReg, arXiv 2105.04906, eq. 6)."""

    kind: Literal["vicreg"] = "vicreg"
    invariance_weight: float = Field(25.0, ge=0)
    """Of the squared distance."""
    variance_weight: float = Field(25.0, ge=0)
    """Of the hinge that keeps each dimension's deviation at 1."""
    covariance_weight: float = Field(1.0, ge=0)
    """Of the off-diagonal covariances."""
    reference: bool = False
    """true: of unit rows, as in ITRA's code, which the hinge at a deviation of 1 can never be satisfied by."""


class Barlow(Matched, WholeBatchTerm):
    """Cross-correlation of student and teacher towards the identity (Barlow Twins, arXiv 2103.03230, eq. 1)."""

    kind: Literal["barlow"] = "barlow"
    redundancy_weight: float = Field(0.0051, ge=0)
    """lambda: of the off-diagonal entries."""
    reference: bool = False
    """true: as in ITRA's code, unit rows, no centring, and a correlation divided by the batch size once too often."""


class Prototype(Matched, Term):
    """Contrast with the clusters of another modality (ProtoCLIP, arXiv 2206.10996, sec. 3).

    An episode clusters the features of the coming samples by k-means, once per tower; a sample's target is its cluster
    in the modality it is matched with, softened by how near the clusters are to each other. Needs a student with
    `prototype_head`, or uses its unit features.
    """

    needs_ids: ClassVar[bool] = True
    kind: Literal["prototype"] = "prototype"
    match: dict[Tower, Tower] = Field({"image": "text", "text": "image"}, min_length=1)
    """Student's tower -> the tower whose clusters it learns: of the student itself, or of `teacher`."""
    teacher: str | None = None
    """null: clusters of the student's own features. A name under `teachers`: of that teacher's."""
    clusters: int = Field(20_000, gt=1)
    """Clusters per tower; an episode needs at least as many samples."""
    episode_samples: int = Field(200_000, gt=1)
    """Samples per episode, rounded down to whole global batches."""
    target_temperature: float | None = Field(0.01, gt=0)
    """Of the similarities between clusters that soften the target; null: hard labels."""
    back_translation: bool = True
    """Compare with the mean feature of the student's own tower in each cluster, not with the cluster's centre (PBT)."""
    iterations: int = Field(20, gt=0)
    """Of k-means."""
    restarts: int = Field(3, gt=0)
    """Of k-means; the best one counts."""
