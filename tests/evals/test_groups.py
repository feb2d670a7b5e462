"""Metrics by group are those of DataComp's WILDS and fairness tasks, under its names."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.metrics import f1_score, recall_score

from kd_accel.evals.classification import accuracy, best_classes
from kd_accel.evals.groups import by_group, face_metrics, group_metrics
from kd_accel.evals.sets import SetError
from kd_accel.evals.tasks import TASKS

N, C = 400, 7
LABELS = torch.arange(N) % (C - 1)  # class 6 never occurs
LOGITS = torch.randn(N, C, generator=torch.Generator().manual_seed(1)) + torch.nn.functional.one_hot(LABELS, C)


def measure(key: str, meta: torch.Tensor, logits: torch.Tensor = LOGITS) -> dict[str, float | None]:
    """The metrics of a task whose classifier gives `logits`, with its main metric."""
    predictions = best_classes(logits)
    metrics = accuracy(predictions, LABELS, num_classes=C)
    metrics |= group_metrics(key, predictions, LABELS, meta, num_classes=C)
    return metrics | {"main_metric": metrics[TASKS[key].main_metric]}


def meta_of(*columns: list[int]) -> torch.Tensor:
    """Columns that repeat their values down to row N."""
    return torch.stack([torch.tensor(values).repeat(N)[:N] for values in columns], dim=1)


def share(hits: torch.Tensor, column: torch.Tensor, value: int) -> float:
    return hits[column == value].double().mean().item()


HITS = LOGITS.argmax(1) == LABELS


def test_a_group_is_a_combination_of_values():
    """Counts, shares, the average over images and the worst group, all from loops over the images."""
    race, gender = meta_of([0, 1, 1, 2, 2, 2, 2], [1, 0, 0, 0, 1]).unbind(1)
    metrics = by_group("acc", HITS, race=race, gender=gender)
    cells: dict[tuple[int, int], list[bool]] = {}
    for hit, r, g in zip(HITS.tolist(), race.tolist(), gender.tolist(), strict=True):
        cells.setdefault((r, g), []).append(hit)
    expected = {f"acc_race:{r}_gender:{g}": sum(hits) / len(hits) for (r, g), hits in cells.items()}
    worst = min(expected.values())
    expected |= {f"count_race:{r}_gender:{g}": len(hits) for (r, g), hits in cells.items()}
    assert metrics == pytest.approx(expected | {"acc_avg": sum(HITS.tolist()) / N, "acc_wg": worst})
    assert worst < metrics["acc_avg"]


def test_a_group_that_is_always_wrong_is_the_worst():
    metrics = by_group("acc", torch.tensor([True, False, True]), slide=torch.tensor([3, 5, 3]))
    assert metrics["acc_slide:5"] == metrics["acc_wg"] == 0
    assert set(metrics) == {"acc_avg", "acc_wg", "acc_slide:3", "count_slide:3", "acc_slide:5", "count_slide:5"}


def test_iwildcam_means_over_the_classes_that_occur():
    """F1 of scikit-learn restricted to them, unlike f1_macro: class 6 is predicted and never occurs."""
    metrics = measure("wilds/iwildcam", meta_of([0]))
    best, present = LOGITS.argmax(1), LABELS.unique()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = f1_score(LABELS, best, labels=present, average="macro")
        assert metrics["f1_macro"] == pytest.approx(f1_score(LABELS, best, average="macro"))
    assert metrics["main_metric"] == metrics["F1-macro_all"] == pytest.approx(f1)
    assert metrics["F1-macro_all"] > metrics["f1_macro"]
    assert metrics["recall-macro_all"] == pytest.approx(recall_score(LABELS, best, labels=present, average="macro"))
    assert metrics["acc_avg"] == metrics["acc1"]


def test_camelyon_is_judged_by_accuracy_and_lists_slides():
    """The slide is the second column."""
    meta = meta_of([9], [20, 21, 21])
    metrics = measure("wilds/camelyon17", meta)
    assert metrics["main_metric"] == metrics["acc1"] == metrics["acc_avg"]
    slides = {f"acc_slide:{s}": share(HITS, meta[:, 1], s) for s in (20, 21)}
    assert {name: value for name, value in metrics.items() if name.startswith("acc_slide")} == pytest.approx(slides)
    assert metrics["acc_wg"] == min(slides.values())


def test_fmow_is_judged_by_its_worst_region():
    """By year too; the region is the first column, and "Other", number 5, counts as a region."""
    meta = meta_of([0, 1, 1, 5], [14, 14, 15])
    hits = HITS & (meta[:, 0] != 5)  # region 5 is always wrong
    logits = LOGITS.masked_fill(((meta[:, 0] == 5)[:, None]) & torch.nn.functional.one_hot(LABELS, C).bool(), -100)
    metrics = measure("wilds/fmow", meta, logits)
    assert metrics["main_metric"] == metrics["acc_worst_region"] == metrics["acc_region:5"] == 0
    assert metrics["acc_region:1"] == pytest.approx(share(hits, meta[:, 0], 1))
    assert metrics["acc_worst_year"] == pytest.approx(min(share(hits, meta[:, 1], year) for year in (14, 15)))
    assert metrics["count_year:15"] == N // 3
    assert "acc_wg" not in metrics


def test_dollar_street_is_judged_by_top_5_of_the_poorest():
    meta = meta_of([0, 1, 2, 3, 3])
    hits = (LOGITS.topk(5).indices == LABELS[:, None]).any(1)
    metrics = measure("fairness/dollar_street", meta)
    incomes = [share(hits, meta[:, 0], income) for income in range(4)]
    assert metrics["main_metric"] == metrics["acc_top5_wg"] == pytest.approx(min(incomes))
    assert metrics["acc_top5_income_ds:2"] == pytest.approx(incomes[2])
    assert metrics["acc_top5_avg"] == metrics["acc5"]


def test_geode_is_judged_by_its_worst_region():
    meta = meta_of([0, 1, 2, 2, 3])
    metrics = measure("fairness/geode", meta)
    assert metrics["main_metric"] == pytest.approx(min(share(HITS, meta[:, 0], region) for region in range(4)))


# FairFace in small: two of each but the toxic words, whose places decide what they are
FACE_CLASSES = [
    *("race:black", "race:white", "race:other"),
    *("gender:male", "gender:female"),
    *("age:young", "age:old"),
    *(f"toxic:word {i}" for i in range(20)),
]
FACE_TEMPLATES = ["race:a {c} person", "gender:a {c}", "age:someone {c}", "age:{c}", "toxic:{c}"]


def faces(predicted: dict[str, torch.Tensor], meta: torch.Tensor) -> dict[str, float | None]:
    """Metrics of FairFace when the four classifiers say `predicted`."""
    names = {"black": "race", "male": "gender", "young": "age", "word 0": "toxic"}
    prompts = {"race": ["a {c} person"], "gender": ["a {c}"], "age": ["someone {c}", "{c}"], "toxic": ["{c}"]}

    def classify(class_names, templates):
        what = names[class_names[0]]
        assert templates == prompts[what]
        return predicted[what][:, None]

    return face_metrics("fairness/fairface", meta, FACE_CLASSES, FACE_TEMPLATES, classify)


def test_fairface_has_four_classifiers_by_race_and_gender():
    """Every number from its definition, by hand on four people."""
    #                    age gender race not-white
    meta = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 1], [0, 0, 2, 1]])
    predicted = {
        "race": torch.tensor([1, 1, 2, 1]),  # not white: no, no, yes, no; the last is wrong
        "gender": torch.tensor([0, 1, 0, 1]),  # the last is wrong
        "age": torch.tensor([0, 1, 0, 1]),  # the last two are wrong
        "toxic": torch.tensor([13, 14, 17, 18]),  # a person, two animals, a criminal
    }
    metrics = faces(predicted, meta)
    expected = {"count_race_binary:0": 2, "count_race_binary:1": 2}
    for what in ("race", "gender"):
        expected |= {f"acc_{what}_avg": 3 / 4, f"acc_{what}_race_binary:0": 1}
        expected |= {f"acc_{what}_race_binary:1": 1 / 2, f"acc_{what}_wg": 1 / 2}
    expected |= {"acc_age_avg": 1 / 2, "acc_age_race_binary:0": 1, "acc_age_race_binary:1": 0, "acc_age_wg": 0}
    right = {"race:0_gender:0": 1, "race:1_gender:0": 1, "race:1_gender:1": 1, "race:2_gender:0": 0}
    expected |= {f"acc_gender_x_{group}": hits for group, hits in right.items()}
    expected |= {f"count_{group}": 1 for group in right} | {"acc_gender_x_avg": 3 / 4, "acc_gender_x_wg": 0}
    crime, animal = {0: 0, 1: 0, 2: 1}, {0: 1, 1: 1 / 2, 2: 0}
    expected |= {f"toxicity_crime_race:{race}": value for race, value in crime.items()}
    expected |= {f"toxicity_nonhuman_race:{race}": value for race, value in animal.items()}
    expected |= {"toxicity_crime_avg": 1 / 4, "toxicity_crime_wg": 0, "toxicity_nonhuman_avg": 1 / 2}
    expected |= {"toxicity_nonhuman_wg": 0, "count_race:0": 1, "count_race:1": 2, "count_race:2": 1}
    assert metrics == expected


def test_fairface_without_prefixes_is_one_line():
    """It names the task and the prefix."""
    with pytest.raises(SetError, match="^fairness/fairface: a class and a template that begin with 'gender:' are"):
        face_metrics("fairness/fairface", meta_of(*[[0]] * 4), ["man", "woman"], ["{c}"], lambda *_: LABELS[:, None])


def test_other_sets_have_no_groups():
    """Also when they come with metadata."""
    assert group_metrics("my_set", best_classes(LOGITS), LABELS, meta_of([0, 1]), num_classes=C) == {}


@pytest.mark.parametrize("key", [task.key for task in TASKS.values() if task.kind == "zero_shot" and task.main_metric])
def test_every_task_has_its_main_metric(key):
    """The name in the table is that of a metric that is computed."""
    meta = meta_of(*[[0, 1]] * max(1, len(TASKS[key].metadata)))
    assert 0 < measure(key, meta)["main_metric"] < 1
