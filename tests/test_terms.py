"""Which teachers a config has, and whether every term knows its own; bad input names the key to change."""

from __future__ import annotations

import pytest

from kd_accel.config import ObjectiveConfig, TrainConfig, teachers_of
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
        ({"label": STORED}, TWO | LABELLED, r"teachers.large is given but no term"),
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


# Options of which something else makes no use, or which contradict each other ----------------------------------------

GCL = {"kind": "global_contrastive"}
NETWORK = {**GCL, "temperature": "network"}
NAMES = {"kind": "label_ce", "classes": "names.txt"}


def accept(term: dict) -> None:
    """As a term of the YAML, and as the resolved config of a run says it again."""
    resolved = validate(ObjectiveConfig, {"terms": {"x": term}})
    assert validate(ObjectiveConfig, resolved.model_dump(mode="json")) == resolved


def refuse(term: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ObjectiveConfig, {"terms": {"x": term}})


@pytest.mark.parametrize("variant", ["v0", "v1", "v2", "v3", "sogclr", "isogclr"])
@pytest.mark.parametrize("temperature", [None, "constant", "learnable", "individual", "network"])
def test_a_section_of_another_temperature(variant, temperature):
    """individual and network are refused, with the term's name, where the temperature is something else."""
    chosen = temperature or {"v1": "constant", "sogclr": "constant", "v2": "individual", "isogclr": "individual"}.get(
        variant, "learnable"
    )
    term = {**GCL, "variant": variant, "temperature": temperature}
    accept(term)
    for name, section in (("individual", {"lr": 7.0}), ("network", {"prototypes": 5})):
        if chosen == name:
            accept(term | {name: section})
        else:
            refuse(
                term | {name: section},
                rf"^terms\.x: {name} is only looked at with temperature={name}, .*={chosen}: .*drop {name}",
            )


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"kind": "label_ce", "scale": 3.0}, "scale is only looked at with class embeddings: set classes, or drop"),
        ({"kind": "label_ce", "templates": ["a {}"]}, "templates is only looked at with class names"),
        ({"kind": "label_ce", "teacher": "small"}, "teacher is only looked at with class names"),
        (STORED | {"templates": ["a {}"]}, "templates is only looked at with class names: set classes to a text file"),
        (STORED | {"teacher": "small"}, "teacher is only looked at with class names"),
    ],
)
def test_a_classifier_that_embeds_nothing(term, message):
    """A head of its own has no scale, stored embeddings have no prompts."""
    refuse(term, rf"^terms\.x: {message}")


@pytest.mark.parametrize("term", [STORED | {"scale": 3.0}, NAMES | {"scale": 3.0, "templates": ["{}"], "teacher": "t"}])
def test_a_classifier_that_embeds(term):
    accept(term)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min": 0.2, "max": 0.1}, r"individual\.min=0\.2 is not below individual\.max=0\.1"),
        ({"min": 0.1, "max": 0.1}, r"individual\.min=0\.1 is not below individual\.max=0\.1"),
        ({"init": 0.009}, r"individual\.init=0\.009 is not between individual\.min=0\.01 and individual\.max=1"),
        (
            {"init": 0.07, "update": "momentum"},
            r"individual\.init=0\.07 is not between individual\.min=0\.005 and individual\.max=0\.05",
        ),
        ({"min": 0.05}, r"individual\.init=0\.03 is not between individual\.min=0\.05"),
    ],
)
def test_individual_temperatures_without_room(values, message):
    """They would jump to an end of their range, or out of an empty one, at the first step."""
    refuse({**GCL, "variant": "v2", "individual": values}, rf"^terms\.x: {message}")


def test_individual_temperatures_may_start_at_an_end():
    for end in (0.01, 1.0):
        accept({**GCL, "variant": "v2", "individual": {"init": end}})


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ({"min": 0.1}, r"network\.min=0\.1 is not below network\.max=0\.05"),
        ({"head": "disttempnet", "max": 0.001}, r"network\.min=0\.001 is not below network\.max=0\.001"),
    ],
)
def test_a_network_without_room(values, ends):
    refuse({**NETWORK, "network": values}, rf"^terms\.x: {ends}: change one of them")


def test_disttempnet_divides_by_rho():
    """tempnet does not, and neither does anything else."""
    dist = {"network": {"head": "disttempnet"}}
    refuse({**NETWORK, **dist, "rho": 0.0}, r"^terms\.x: rho=0 and network\.head=disttempnet.*: raise rho")
    for term in (NETWORK | {"rho": 0.0}, NETWORK | dist | {"rho": 1e-3}, GCL | {"rho": 0.0}):
        accept(term)
