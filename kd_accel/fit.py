"""Whether the terms fit the student, the teachers and the data: what only shows once they are built.

Everything is checked before the first step and names the key to change.
"""

from __future__ import annotations

from torch import Tensor

from kd_accel import terms
from kd_accel.bindings import features_read, teacher_towers_read
from kd_accel.chunks import through_head
from kd_accel.config import ObjectiveConfig
from kd_accel.schema import ConfigError
from kd_accel.types import TeacherSpec

_ONE_SPACE = (  # terms that compare a student's feature with a teacher's, number by number
    *(terms.FeatureMSE, terms.MaskedFeatureMSE, terms.InteractiveContrastive, terms.CrossKL, terms.Gradient),
    *(terms.EmbeddingMSE, terms.EmbeddingL1, terms.EmbeddingHuber, terms.EmbeddingCE, terms.EmbeddingKL),
    *(terms.Cosine, terms.SimReg, terms.Dino, terms.ProtoCPC, terms.Seed, terms.VICReg, terms.Barlow),
)
_SEVERAL = (terms.GlobalContrastive, terms.CosDiff, terms.RKD, terms.VICReg, terms.Barlow)  # undefined for one sample


def check_fit(
    config: ObjectiveConfig,
    *,
    widths: dict[str, int],
    teachers: dict[str, TeacherSpec],
    num_samples: int | None,
    global_batch: int,
    own_bias: float | None,
) -> None:
    """Raises ConfigError, one line per term that cannot work.

    `widths` are those of the student's features by name, `own_bias` the logit bias that it brings.
    """
    problems = []
    for name, term in config.terms.items():
        key = f"objective.terms.{name}"
        if terms.confidence_of(term) == "sigmoid" and global_batch < 2:
            problems.append(
                f"{key}.confidence=sigmoid compares different samples: raise data.batch_size above {global_batch}, or"
                " set it to true"
            )
        if _compares(term):
            problems += _check_widths(key, term, widths, teachers)
        match term:
            case terms.Compress() | terms.Seed() if num_samples is not None and term.queue_size > num_samples:
                problems.append(
                    f"{key}.queue_size={term.queue_size} is larger than the data, {num_samples} samples: lower it"
                )
            case terms.Prototype() if num_samples is not None and term.episode_samples > num_samples:
                given = f"{key}.episode_samples={term.episode_samples}"
                problems.append(f"{given} is larger than the data, {num_samples} samples: lower it")
            case terms.LabelCE(classes=None) if "class_logits" not in widths:
                problems.append(
                    f"{key} needs class embeddings or a class head: set {key}.classes or student.num_classes"
                )
            case terms.GlobalContrastive(temperature="network") if _more_than_the_batch(term, global_batch):
                problems.append(
                    f"{key}.network.prototypes={term.network.prototypes} are taken from the first global batch, which"
                    f" has {global_batch} samples: lower it, or raise data.batch_size"
                )
            case terms.SigLip() if config.logit_bias is None and own_bias is None:
                problems.append(
                    f"{key} is siglip and needs a bias, which the student does not bring: set objective.logit_bias (-10"
                    " in the paper, with temperature.init=0.1)"
                )
            case _ if global_batch < 2 and isinstance(term, _SEVERAL):
                problems.append(f"{key} compares different samples: raise data.batch_size above {global_batch}")
    if problems:
        raise ConfigError("\n".join(problems))


def match_towers(config: ObjectiveConfig, *, towers: list[str], teachers: dict[str, TeacherSpec]) -> ObjectiveConfig:
    """`config` whose terms match only `towers`, those of the student, with towers that their teacher has.

    A `match` that the user wrote stays. Raises ConfigError where student and teacher have no tower in common.
    """
    matched = {}
    for name, term in config.terms.items():
        matched[name] = term
        if not isinstance(term, terms.Matched) or "match" in term.model_fields_set:
            continue
        theirs = [teachers[n].towers for n in terms.teachers_read(term, list(teachers))] or [tuple(towers)]
        pairs = {a: b for a, b in term.match.items() if a in towers and all(b in has for has in theirs)}
        if not pairs:
            raise ConfigError(
                f"objective.terms.{name}: the student has {' and '.join(towers)}, what it learns from has"
                f" {' and '.join(theirs[0])}: say which learns from which, for instance"
                f" match={{{towers[0]}: {theirs[0][0]}}}"
            )
        matched[name] = term.model_copy(update={"match": pairs})
    return config.model_copy(update={"terms": matched})


def check_towers(config: ObjectiveConfig, *, widths: dict[str, int], teachers: dict[str, TeacherSpec]) -> None:
    """Raises ConfigError, one line per term that reads a tower which the student or its teacher does not have."""
    problems = []
    for name, term in config.terms.items():
        key = f"objective.terms.{name}"
        missing = {"text" if read.endswith("text") else "image" for read in features_read(term, widths) - widths.keys()}
        if isinstance(term, terms.LabelCE) and term.classes is None:
            missing = set()  # check_fit asks for a head
        for tower in sorted(missing):
            problems.append(
                f"{key} reads the student's {tower} features, but it has no {tower} tower: see student.arch"
            )
        for teacher in terms.teachers_read(term, list(teachers)):
            for tower in sorted(teacher_towers_read(term) - set(teachers[teacher].towers)):
                problems.append(f"{key} reads the {tower} features of {teacher}, which has no {tower} tower")
    if problems:
        raise ConfigError("\n".join(problems))


def check_class_width(key: str, embeddings: Tensor, widths: dict[str, int]) -> None:
    """Raises ConfigError when class embeddings [C, d] are not as wide as the student's image features."""
    width = widths[through_head("projected", "image", widths)]
    if embeddings.shape[1] != width:
        raise ConfigError(
            f"{key}: class embeddings are {embeddings.shape[1]} wide, the student's image features {width}: set"
            f" student.projector=linear with the teacher that made them, or student.embed_dim={embeddings.shape[1]}"
            f" (of an inline arch student.arch.embed_dim), or give embeddings {width} wide"
        )


def _more_than_the_batch(term: terms.GlobalContrastive, global_batch: int) -> bool:
    """Whether a TempNet wants more prototypes than its first batch has; DistTempNet's code keeps random ones."""
    keeps = term.reference and term.network.head == "disttempnet"
    return term.network.prototypes > global_batch and not keeps


def _compares(term: terms.Term) -> bool:
    return isinstance(term, _ONE_SPACE) or isinstance(term, terms.Compress) and term.queues == "1q"


def _check_widths(key: str, term: terms.Term, widths: dict[str, int], teachers: dict[str, TeacherSpec]) -> list[str]:
    teacher = term.teacher or next(iter(teachers))
    theirs = teachers[teacher].embed_dim
    towers = term.match if isinstance(term, terms.Matched) else ("image", "text")
    ours = {widths[through_head("projected", tower, widths)] for tower in towers}
    if ours == {theirs}:
        return []
    given = ", ".join(map(str, sorted(ours)))
    return [
        f"{key} compares features of the student ({given} wide) and of the teacher ({theirs} wide): set"
        f" student.projector=linear, student.embed_dim={theirs} (of an inline arch student.arch.embed_dim={theirs}),"
        f" {key}.kind=logit_kl or another that compares no rows (rkd, affinity), or {key}=null"
    ]
