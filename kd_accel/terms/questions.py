"""What is asked of any term: its teachers, its confidence, its scale."""

from __future__ import annotations

from collections.abc import Mapping

from kd_accel.terms.base import DistillationTerm, Term
from kd_accel.terms.contrastive import LabelCE
from kd_accel.terms.distillation import MobileClip
from kd_accel.terms.relational import Prototype


def check_teachers(terms: Mapping[str, Term], names: list[str]) -> None:
    """Raises ValueError when a term has no teacher to learn from, or a teacher no term."""
    used: set[str] = set()
    for name, term in terms.items():
        used.update(_teachers_of(f"objective.terms.{name}", term, names))
    if idle := [name for name in names if name not in used]:
        key = "teacher" if names == ["teacher"] else f"teachers.{idle[0]}"
        raise ValueError(
            f"{key} is given but no term of objective.terms uses it: add one (logit_kl, ...) or set {key}=null"
        )


def confidence_of(term: Term) -> bool | str:
    """How the term weighs samples by its teacher's confidence; false for those that cannot."""
    return isinstance(term, DistillationTerm) and term.confidence


def teachers_read(term: Term, names: list[str]) -> list[str]:
    """Those of the teachers `names` whose features the term looks at in every step."""
    if isinstance(term, MobileClip):
        return term.teachers or names
    if isinstance(term, DistillationTerm):
        return [term.teacher or names[0]]
    return [term.teacher] if isinstance(term, Prototype) and term.teacher else []


def has_own_scale(term: Term) -> bool:
    """Whether the term learns a logit scale of its own."""
    return isinstance(term, Prototype) or getattr(term, "scale", None) == "own"


def _teachers_of(key: str, term: Term, names: list[str]) -> list[str]:
    """The teachers of a term."""
    if isinstance(term, MobileClip):
        if term.teachers is None and not names:
            raise ValueError(f"{key} needs a teacher: add the section teacher or teachers, or set the term to null")
        return [_known(f"{key}.teachers", name, names) for name in term.teachers or names]
    given = getattr(term, "teacher", None)
    if given is not None:
        return [_known(f"{key}.teacher", given, names)]
    if isinstance(term, Prototype) or not _needs_one(term):
        return []  # the student's own clusters; a term of the student alone
    if not names:
        raise ValueError(f"{key} needs a teacher: add the section teacher, or set the term to null")
    if len(names) > 1:
        raise ValueError(f"{key} has to name its teacher: set {key}.teacher to one of {', '.join(names)}")
    return names


def _needs_one(term: Term) -> bool:
    """A classifier needs one when its classes are names that are still to be embedded."""
    if isinstance(term, LabelCE):
        return term.classes is not None and not term.classes.endswith(".safetensors")
    return isinstance(term, DistillationTerm)


def _known(key: str, name: str, names: list[str]) -> str:
    if name not in names:
        raise ValueError(f"{key}: there is no teacher '{name}'; there is {', '.join(names) or 'none'}")
    return name
