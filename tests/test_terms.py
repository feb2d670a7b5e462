"""Which teachers a config has, and whether every term knows its own; bad input names the key to change."""

from __future__ import annotations

import pytest

from kd_accel.config import TrainConfig, teachers_of
from kd_accel.schema import ConfigError, validate

ONE = {"teacher": {"path": "t"}}
TWO = {"teachers": {"large": {"path": "l"}, "small": {"path": "s"}}}
CLIP = {"kind": "clip"}
STORED = {"kind": "label_ce", "classes": "stored.safetensors"}
LABELLED = {"data": {"shards": "d", "batch_size": 8, "label": "cls"}}


def config(terms: dict, **values) -> TrainConfig:
    base = {"name": "run", "data": {"shards": "d", "batch_size": 8}, "student": {"arch": "ViT-B-16"}}
    base |= {"objective": {"terms": terms}, "optim": {"lr": 1e-3, "steps": 1}}
    return validate(TrainConfig, base | values)


def test_a_single_teacher_is_called_teacher():
    kl = {"kl": {"kind": "logit_kl"}}
    assert list(teachers_of(config(kl, **ONE))) == ["teacher"]
    assert teachers_of(config({"clip": CLIP})) == {}


def test_terms_name_one_of_several():
    """Ensembles may take all of them."""
    terms = {"kl": {"kind": "logit_kl", "teacher": "small"}, "dr": {"kind": "mobileclip"}}
    assert list(teachers_of(config(terms, **TWO))) == ["large", "small"]


@pytest.mark.parametrize(
    ("terms", "values", "message"),
    [
        ({"kl": {"kind": "logit_kl"}}, {}, r"objective.terms.kl needs a teacher: add the section teacher"),
        ({"dr": {"kind": "mobileclip"}}, {}, r"objective.terms.dr needs a teacher"),
        ({"kl": {"kind": "logit_kl"}}, TWO, r"set objective.terms.kl.teacher to one of large, small"),
        ({"kl": {"kind": "logit_kl", "teacher": "big"}}, TWO, r"kl.teacher: there is no teacher 'big'; there is large"),
        ({"dr": {"kind": "mobileclip", "teachers": ["x"]}}, TWO, r"dr.teachers: there is no teacher 'x'"),
        ({"p": {"kind": "prototype", "teacher": "x"}}, TWO, r"p.teacher: there is no teacher 'x'"),
        (
            {"kl": {"kind": "logit_kl", "teacher": "small"}},
            TWO,
            r"teachers.large is given but no term .* or set teachers.large=null",
        ),
        ({"clip": CLIP}, ONE, r"teacher is given but no term of objective.terms uses it: .* or set teacher=null"),
        ({"label": STORED | {"teacher": "small"}}, TWO | LABELLED, r"teachers.large is given but no term"),
        (
            {"dr": {"kind": "mobileclip", "teachers": ["large", "large"]}},
            TWO,
            r"a teacher stands in the ensemble twice",
        ),
        ({"dr": {"kind": "mobileclip", "confidence": True}}, TWO, r"objective.terms.dr.confidence: should be .*False"),
        ({"a.b": CLIP}, {}, r"'a.b' cannot name a term"),
        ({"clip": CLIP}, ONE | TWO, r"give either teacher or teachers"),
        ({"clip": CLIP}, {"teachers": {"student": {"path": "x"}}}, r"'student' cannot name a teacher"),
        ({"clip": CLIP}, {"teachers": {"A.b": {"path": "x"}}}, r"'A.b' cannot name a teacher"),
    ],
)
def test_what_does_not_fit(terms, values, message):
    with pytest.raises(ConfigError, match=message):
        config(terms, **values)


def test_a_teacher_of_a_base_file_can_be_dropped():
    """null, as for terms and sections."""
    two = {"teachers": TWO["teachers"] | {"small": None}}
    assert list(teachers_of(config({"kl": {"kind": "logit_kl"}}, **two))) == ["large"]


def test_prototypes_are_the_students_own_unless_told():
    """No teacher is needed for them."""
    config({"p": {"kind": "prototype"}})


@pytest.mark.parametrize(("classes", "needed"), [("names.txt", True), ("stored.safetensors", False), (None, False)])
def test_only_class_names_need_a_teacher(classes, needed):
    """Somebody has to embed them."""
    label = {"label": {"kind": "label_ce", "classes": classes}}
    if needed:
        with pytest.raises(ConfigError, match="objective.terms.label needs a teacher"):
            config(label, **LABELLED)
    else:
        config(label, **LABELLED)


def test_labels_have_to_come_from_somewhere():
    with pytest.raises(ConfigError, match="objective.terms.label needs labels: set data.label"):
        config({"label": {"kind": "label_ce"}})
