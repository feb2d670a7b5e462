"""Names of tasks and suites stand for the sets that the published systems are compared on."""

from __future__ import annotations

import pytest

from kd_accel.evals.tasks import SUITES, TASKS, expand
from kd_accel.schema import ConfigError

# suite -> rows, as in DataComp's tasklist.yml, ProtoCLIP's README and the two READMEs that average IN & Variants
SIZES = {
    "imagenet": 1,
    "imagenet_variants": 7,
    "retrieval": 3,
    "vtab": 13,
    "datacomp38": 40,
    "protoclip": 10,
    "coco": 1,
}


def test_suites_have_their_published_sizes():
    """Each key once, and every key is a task."""
    assert {name: len(expand([name])) for name in SUITES} == SIZES
    assert all(set(keys) <= TASKS.keys() for keys in SUITES.values())


def test_main_metrics_are_datacomps():
    """Every task that has an entry main_metric in tasklist.yml, and the two that have none; the rest is top-1."""
    ours = {task.key: task.main_metric for task in expand(["datacomp38"]) if task.main_metric != "acc1"}
    assert ours == {
        "vtab/caltech101": "mean_per_class_recall",
        "vtab/flowers": "mean_per_class_recall",
        "vtab/pets": "mean_per_class_recall",
        "fgvc_aircraft": "mean_per_class_recall",
        "retrieval/flickr_1k_test_image_text_retrieval": "mean_recall@1",
        "retrieval/mscoco_2014_5k_test_image_text_retrieval": "mean_recall@1",
        "misc/winogavil": "jaccard_score_10-12",
        "wilds/iwildcam": "F1-macro_all",
        "wilds/fmow": "acc_worst_region",
        "fairness/dollar_street": "acc_top5_wg",
        "fairness/geode": "acc_wg",
        "fairness/fairface": None,
        "fairness/utkface": None,
    }


def test_titles_and_keys_are_unique():
    assert len({task.title for task in TASKS.values()}) == len(TASKS)
    assert all(key == task.key for key, task in TASKS.items())


def test_names_expand_in_order_and_once():
    """A task that a suite brings along is not evaluated twice."""
    keys = [task.key for task in expand(["objectnet", "imagenet", "imagenet_variants", "imagenet1k", "coco"])]
    assert keys[:2] == ["objectnet", "imagenet1k"]
    assert sorted(keys) == sorted([*SUITES["imagenet_variants"], "coco"])
    assert expand([]) == []


def test_unknown_names_come_with_the_nearest_known_one():
    """One line for each of them; a short name finds the key that ends with it."""
    with pytest.raises(ConfigError) as caught:
        expand(["imagenet", "imagenet_variant", "cifar100"])
    lines = str(caught.value).splitlines()
    assert lines == [
        "tasks: no task or suite 'imagenet_variant'; did you mean 'imagenet_variants'?",
        "tasks: no task or suite 'cifar100'; did you mean 'vtab/cifar100'?",
    ]
