"""Terms that remember or learn something of their own: memory by sample id, queues, running means, clusters, layers.

Each is a module with the same few methods, which the objective calls in this order:

    derive(student, teachers, progress)   leaves made from this rank's features, with a graph
    prepare(step, progress)               look up what this step needs
    rows(chunk, scale)                    one number per row, [c]; notes what is to be remembered
    commit(ids, noted)                    remember what all ranks noted; only when the engine took its step
"""

from __future__ import annotations

from kd_accel import terms
from kd_accel.recall.base import Recall, Rows
from kd_accel.recall.centers import Centers
from kd_accel.recall.clusters import Clusters
from kd_accel.recall.fusion import Fusion
from kd_accel.recall.global_contrast import GlobalContrast
from kd_accel.recall.queues import Queues
from kd_accel.types import TeacherSpec

__all__ = ["Centers", "Clusters", "Fusion", "GlobalContrast", "Queues", "Recall", "Rows", "build"]


def build(
    name: str,
    term: terms.Term,
    *,
    widths: dict[str, int],
    teachers: dict[str, TeacherSpec],
    num_ids: int | None,
    sharded: bool,
    betas: tuple[float, float],
    eps: float,
) -> Recall | None:
    """The module of a term that has one. `sharded`: each rank remembers a part of the `num_ids` samples; `betas` and
    `eps` are those of the Adam of individual temperatures."""
    own = getattr(term, "teacher", None) or next(iter(teachers), None)
    teacher_width = None if own is None else teachers[own].embed_dim
    match term:
        case terms.GlobalContrastive():
            adam = {"betas": betas, "eps": eps}
            return GlobalContrast(name, term, num_ids=num_ids, sharded=sharded, width=widths.get("image"), **adam)
        case terms.Compress() | terms.Seed():
            return Queues(name, term, widths=widths, teacher_width=teacher_width)
        case terms.Dino() | terms.ProtoCPC():
            return Centers(name, term, width=teacher_width)
        case terms.Prototype():
            external = teacher_width if term.teacher else None
            return Clusters(name, term, num_ids=num_ids, sharded=sharded, widths=widths, target_width=external)
        case terms.AugmentedFeature():
            return Fusion(name, term, widths=widths, teacher_width=teacher_width)
    return None
