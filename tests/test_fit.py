"""What only shows once student, teachers and data are known: one line per term that cannot work, with the key."""

from __future__ import annotations

import pytest
import torch

from kd_accel.config import ObjectiveConfig
from kd_accel.fit import check_class_width, check_fit
from kd_accel.schema import ConfigError, validate
from kd_accel.types import TeacherSpec

WIDTHS = {"image": 8, "text": 8}


def check(
    term: dict,
    *,
    widths: dict[str, int] = WIDTHS,
    num_samples: int = 100,
    global_batch: int = 16,
    own_bias: float | None = None,
    **values,
) -> None:
    config = validate(ObjectiveConfig, {"terms": {"x": term}, **values})
    teachers = {"teacher": TeacherSpec(12, 1.0)}
    sizes = {"num_samples": num_samples, "global_batch": global_batch}
    check_fit(config, widths=widths, teachers=teachers, own_bias=own_bias, **sizes)


@pytest.mark.parametrize(
    "kind",
    (
        "feature_mse masked_feature_mse interactive_contrastive cross_kl gradient embedding_mse embedding_l1"
        " embedding_huber embedding_ce embedding_kl cosine simreg dino proto_cpc vicreg barlow"
    ).split(),
)
def test_features_of_two_widths_cannot_be_compared(kind):
    """The student's projector makes them alike; the line names it, and each other key that helps."""
    with pytest.raises(
        ConfigError, match=r"objective.terms.x .* \(8 wide\) .* \(12 wide\): set student.projector"
    ) as error:
        check({"kind": kind})
    said = str(error.value)
    assert "\n" not in said
    for key in (
        "student.embed_dim=12",
        "student.arch.embed_dim=12",
        "objective.terms.x.kind=",
        "objective.terms.x=null",
    ):
        assert key in said
    check({"kind": kind}, widths=WIDTHS | {"projected_image": 12, "projected_text": 12})


@pytest.mark.parametrize("kind", ["rkd", "logit_kl", "affinity", "mobileclip", "soft_label", "augmented_feature"])
def test_relations_may_have_two_widths(kind):
    check({"kind": kind})


@pytest.mark.parametrize("kind", ["compress", "seed"])
def test_a_queue_larger_than_the_data(kind):
    """It would hold samples against themselves."""
    widths = {"image": 12, "text": 12}
    with pytest.raises(ConfigError, match=r"objective.terms.x.queue_size=101 is larger than the data, 100 samples"):
        check({"kind": kind, "queue_size": 101}, widths=widths)
    check({"kind": kind, "queue_size": 100}, widths=widths)


def test_an_episode_larger_than_the_data():
    with pytest.raises(ConfigError, match=r"objective.terms.x.episode_samples=101 is larger than the data"):
        check({"kind": "prototype", "episode_samples": 101})


def test_labels_need_classes_or_a_head():
    with pytest.raises(ConfigError, match=r"set objective.terms.x.classes or student.num_classes"):
        check({"kind": "label_ce"})
    check({"kind": "label_ce"}, widths=WIDTHS | {"class_logits": 3})


def test_prototypes_of_a_network_come_from_one_batch():
    term = {"kind": "global_contrastive", "temperature": "network", "network": {"prototypes": 17}}
    with pytest.raises(ConfigError, match=r"objective.terms.x.network.prototypes=17 .* which has 16 samples"):
        check(term)
    check(term, global_batch=17)


def test_random_prototypes_come_from_no_batch():
    """DistTempNet's own code keeps them."""
    network = {"head": "disttempnet", "prototypes": 17}
    term = {"kind": "global_contrastive", "temperature": "network", "network": network}
    check(term | {"reference": True})
    with pytest.raises(ConfigError, match=r"network.prototypes=17"):
        check(term)
    with pytest.raises(ConfigError, match=r"network.prototypes=17"):
        check(term | {"reference": True, "network": network | {"head": "tempnet"}})


@pytest.mark.parametrize("kind", ["global_contrastive", "cos_diff", "rkd", "vicreg", "barlow"])
def test_some_terms_need_two_samples(kind):
    """Their formulas divide by the number of the others."""
    with pytest.raises(ConfigError, match="compares different samples: raise data.batch_size above 1"):
        check({"kind": kind}, widths={"image": 12, "text": 12}, global_batch=1)


def test_hardness_needs_two_samples():
    """It is counted in deviations of the batch."""
    term = {"kind": "logit_kl", "confidence": "sigmoid"}
    with pytest.raises(ConfigError, match=r"objective.terms.x.confidence=sigmoid compares .* data.batch_size above 1"):
        check(term, global_batch=1)
    check(term, global_batch=2)
    check(term | {"confidence": True}, global_batch=1)


def test_siglip_needs_a_bias():
    """The config's, or the student's own."""
    with pytest.raises(ConfigError, match=r"^objective.terms.x is siglip and needs a bias.*set objective.logit_bias"):
        check({"kind": "siglip"})
    check({"kind": "siglip"}, own_bias=-12.9)
    check({"kind": "siglip"}, logit_bias=-10.0)


def test_class_embeddings_of_another_width():
    """They have to be as wide as the student's image features, or what its projector makes of them."""
    embeddings = torch.randn(3, 12)
    said = r"the.key: class embeddings are 12 wide, the student's image features 8: .* student.embed_dim=12"
    with pytest.raises(ConfigError, match=said):
        check_class_width("the.key", embeddings, WIDTHS)
    check_class_width("the.key", embeddings, WIDTHS | {"projected_image": 12})
