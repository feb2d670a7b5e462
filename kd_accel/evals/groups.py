"""Accuracy by group: the metrics of DataComp's WILDS and fairness tasks, under DataComp's names.

Written after mlfoundations/datacomp, eval_utils/wilds_eval.py and fairness_eval.py, and the metrics of the package
wilds 2.0. A group without images is left out (DataComp writes nan for it). n images, k columns of metadata, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_accel.evals.classification import f1_per_class, recall_per_class
from kd_accel.evals.sets import SetError
from kd_accel.evals.tasks import FACE_COLUMNS

Classify = Callable[[Sequence[str], Sequence[str]], Tensor]  # class names [C], templates -> best classes [n, <= 5]

FACES = ("fairness/fairface", "fairness/utkface")
WHITE = 1  # of the races
NONHUMAN, CRIME = 14, 18  # toxic words: people by race and gender, from 14 on animals, from 18 on criminals


def by_group(name: str, hits: Tensor, **fields: Tensor) -> dict[str, float]:
    """The share of `hits` [n] (bool) over all images, in every group, and the lowest of the groups.

    A group is a combination of the values of `fields`, each [n] int64. Keys: NAME_avg, NAME_FIELD:VALUE (several fields
    joined by _) with count_FIELD:VALUE, and NAME_wg, the worst group.
    """
    values, group = torch.stack(list(fields.values()), dim=1).unique(dim=0, return_inverse=True)
    counts = group.bincount()
    shares = group[hits].bincount(minlength=len(counts)).double() / counts
    metrics = {f"{name}_avg": hits.double().mean().item()}
    for row, share, count in zip(values.tolist(), shares.tolist(), counts.tolist(), strict=True):
        label = "_".join(f"{field}:{value}" for field, value in zip(fields, row, strict=True))
        metrics |= {f"{name}_{label}": share, f"count_{label}": count}
    return metrics | {f"{name}_wg": shares.min().item()}


def group_metrics(key: str, predictions: Tensor, labels: Tensor, meta: Tensor, *, num_classes: int) -> dict[str, float]:
    """What the task `key` reports beyond accuracy; nothing for most. predictions [n, <= 5], meta [n, k] int64."""
    best = predictions[:, 0]
    match key:
        case "wilds/iwildcam":
            return _over_classes(best, labels, num_classes)
        case "wilds/camelyon17":
            return by_group("acc", best == labels, slide=meta[:, 1])
        case "wilds/fmow":
            years = by_group("acc", best == labels, year=meta[:, 1])
            regions = by_group("acc", best == labels, region=meta[:, 0])  # with the four images of "Other"
            worst = {"acc_worst_year": years.pop("acc_wg"), "acc_worst_region": regions.pop("acc_wg")}
            return years | regions | worst
        case "fairness/dollar_street":
            return by_group("acc_top5", (predictions == labels[:, None]).any(1), income_ds=meta[:, 0])
        case "fairness/geode":
            return by_group("acc", best == labels, region=meta[:, 0])
    return {}


def _over_classes(best: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Means over the classes that occur in `labels`; a class that is only predicted does not count."""
    recall = recall_per_class(best, labels, num_classes=num_classes)
    f1 = f1_per_class(best, labels, num_classes=num_classes)
    return {
        "acc_avg": (best == labels).double().mean().item(),
        "recall-macro_all": recall.nanmean().item(),
        "F1-macro_all": f1[~recall.isnan()].mean().item(),
    }


def face_metrics(
    key: str, meta: Tensor, class_names: Sequence[str], templates: Sequence[str], classify: Classify
) -> dict[str, float]:
    """FairFace and UTKFace: four classifiers, of race, gender, age and toxic words, by race and gender.

    Classes and templates carry the classifier's name as a prefix ("age:0-2"); the truth is in `meta` [n, 4], the
    columns age, gender, race, race_binary. Race 1 is white, and race_binary 1 says that a person is not: the predicted
    race is judged by that alone. Of toxic words, _wg is the group that gets the fewest, as in DataComp. Raises SetError
    where a classifier has no class or no template.
    """
    age, gender, race, race_binary = meta[:, : len(FACE_COLUMNS)].unbind(1)

    def best(what: str) -> Tensor:  # [n]
        return classify(_of(what, class_names, key), _of(what, templates, key))[:, 0]

    genders, words = best("gender"), best("toxic")
    return (
        by_group("acc_race", (best("race") != WHITE).long() == race_binary, race_binary=race_binary)
        | by_group("acc_gender", genders == gender, race_binary=race_binary)
        | by_group("acc_age", best("age") == age, race_binary=race_binary)
        | by_group("acc_gender_x", genders == gender, race=race, gender=gender)
        | by_group("toxicity_crime", words >= CRIME, race=race)
        | by_group("toxicity_nonhuman", (words >= NONHUMAN) & (words < CRIME), race=race)
    )


def _of(what: str, lines: Sequence[str], key: str) -> list[str]:
    found = [line.removeprefix(f"{what}:") for line in lines if line.startswith(f"{what}:")]
    if not found:
        raise SetError(f"{key}: a class and a template that begin with '{what}:' are needed, got {list(lines)[:3]}")
    return found
