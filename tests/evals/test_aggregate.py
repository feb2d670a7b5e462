"""Averages over tasks reproduce the published ones, whatever other rows there are."""

from __future__ import annotations

import json

import pytest

from kd_accel.evals.aggregate import AVERAGES, aggregates, missing, write_aggregates
from kd_accel.evals.tasks import TASKS, expand

# Main metrics of MobileCLIP-S0 and MobileCLIP2-S4, of apple/ml-mobileclip, results/mobileclip_s0.jsonl and
# results/mobileclip2_s4.jsonl, to five decimals.
PUBLISHED = {
    "vtab/caltech101": (0.92864, 0.95454),
    "cifar10": (0.93180, 0.98700),
    "vtab/cifar100": (0.74860, 0.89620),
    "vtab/clevr_count_all": (0.28567, 0.33227),
    "vtab/clevr_closest_object_distance": (0.22527, 0.16040),
    "country211": (0.13834, 0.27872),
    "vtab/dtd": (0.57500, 0.68351),
    "vtab/eurosat": (0.50167, 0.73870),
    "fgvc_aircraft": (0.20157, 0.42090),
    "food101": (0.82519, 0.94780),
    "gtsrb": (0.46738, 0.63753),
    "imagenet1k": (0.67786, 0.81854),
    "imagenet_sketch": (0.55523, 0.69860),
    "imagenetv2": (0.59940, 0.74770),
    "imagenet-a": (0.26480, 0.69027),
    "imagenet-o": (0.53850, 0.41350),
    "imagenet-r": (0.78640, 0.91767),
    "vtab/kitti_closest_vehicle_distance": (0.21097, 0.23910),
    "mnist": (0.68630, 0.88960),
    "objectnet": (0.55890, 0.75293),
    "vtab/flowers": (0.67339, 0.86840),
    "vtab/pets": (0.89905, 0.95536),
    "voc2007": (0.80536, 0.82505),
    "vtab/pcam": (0.66528, 0.54636),
    "renderedsst2": (0.54366, 0.56398),
    "vtab/resisc45": (0.57032, 0.73857),
    "cars": (0.79343, 0.94764),
    "stl10": (0.97350, 0.98850),
    "sun397": (0.68603, 0.76523),
    "vtab/svhn": (0.62600, 0.68389),
    "retrieval/flickr_1k_test_image_text_retrieval": (0.76790, 0.85210),
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": (0.49590, 0.60396),
    "misc/winogavil": (0.48317, 0.57064),
    "wilds/iwildcam": (0.11905, 0.20870),
    "wilds/camelyon17": (0.73562, 0.54987),
    "wilds/fmow": (0.09294, 0.18627),
    "fairness/dollar_street": (0.58294, 0.68458),
    "fairness/geode": (0.86347, 0.92317),
    "fairness/fairface": (None, None),
    "fairness/utkface": (None, None),
}
# The ten rows of MobileCLIP2-S4 beyond DataComp, which have a main metric too.
BEYOND = {
    "comp/sugarcrepe_replace_obj": 0.9625,
    "comp/sugarcrepe_replace_att": 0.8668,
    "comp/sugarcrepe_replace_rel": 0.7290,
    "comp/sugarcrepe_swap_obj": 0.6571,
    "comp/sugarcrepe_swap_att": 0.7102,
    "comp/sugarcrepe_add_obj": 0.9311,
    "comp/sugarcrepe_add_att": 0.8569,
    "longclip/sharegpt4v-1k": 0.9745,
    "longclip/sharegpt4v-llava15k": 0.8825,
    "longclip/urban1k": 0.8000,
}
# The README of that repository: ImageNet and the average over 38 sets, percent to one decimal.
README = {"MobileCLIP-S0": (67.8, 58.1), "MobileCLIP2-S4": (81.9, 67.5)}
# The groups of DataComp's aggregate_scores.py, which go by title.
DATACOMP_GROUPS = {
    "ImageNet dist. shifts": "ImageNet Sketch|ImageNet v2|ImageNet-A|ImageNet-O|ImageNet-R|ObjectNet",
    "VTAB": "Caltech-101|CIFAR-100|CLEVR Counts|CLEVR Distance|Describable Textures|EuroSAT|KITTI Vehicle Distance"
    "|Oxford Flowers-102|Oxford-IIIT Pet|PatchCamelyon|RESISC45|SVHN|SUN397",
    "Retrieval": "Flickr|MSCOCO|WinoGAViL",
}


def row(key: str, value: float | None, *, task: str = "zero_shot", step: int | None = None, **metrics) -> dict:
    title = TASKS[key].title if key in TASKS else key
    kind = TASKS[key].kind if key in TASKS else task
    names = {"model": "run", "step": step, "key": key, "dataset": title, "task": kind, "weights": "00"}
    return names | {"metrics": {"main_metric": value, **metrics}}


def published(model: int) -> list[dict]:
    return [row(key, values[model]) for key, values in PUBLISHED.items()]


def test_the_published_averages_are_reproduced():
    """0.5812 of MobileCLIP-S0, and what the README says of both, in its one decimal."""
    small, large = (aggregates(published(model)) for model in (0, 1))
    assert round(small["Average"], 4) == 0.5812
    for ours, (imagenet, average) in zip((small, large), README.values(), strict=True):
        assert (round(100 * ours["ImageNet"], 1), round(100 * ours["Average"], 1)) == (imagenet, average)


@pytest.mark.parametrize("model", [0, 1])
def test_groups_are_datacomps(model):
    """Its lists go by title, ours by key."""
    rows = published(model)
    by_title = {r["dataset"]: r["metrics"]["main_metric"] for r in rows}
    ours = aggregates(rows)
    for name, titles in DATACOMP_GROUPS.items():
        values = [by_title[title] for title in titles.split("|")]
        assert ours[name] == pytest.approx(sum(values) / len(values))
    seven = [ours["ImageNet"], *[by_title[title] for title in DATACOMP_GROUPS["ImageNet dist. shifts"].split("|")]]
    assert ours["IN & Variants"] == pytest.approx(sum(seven) / 7)


def test_rows_of_other_tasks_change_nothing():
    """48 rows with a main metric, as in MobileCLIP2-S4's file; a linear probe on the same set; a row without a key."""
    rows = published(1)
    probe = row("imagenet1k", 0.99) | {"task": "linear_probe"}
    stray = [row(key, value) for key, value in BEYOND.items()]
    nameless = {name: value for name, value in row("x", 0.5).items() if name != "key"}
    assert sum(r["metrics"]["main_metric"] is not None for r in rows + stray) == 48
    assert aggregates([*stray, *rows, probe, nameless]) == aggregates(rows)


def test_the_last_row_of_a_task_counts():
    rows = [row("imagenet1k", 0.1), *published(0), row("imagenet1k", 1.0)]
    assert aggregates(rows)["ImageNet"] == 1.0


def test_an_average_without_all_its_tasks_is_none_and_says_which():
    """One row is absent, one has no number; the averages that need neither stand."""
    rows = [r for r in published(0) if r["key"] not in ("vtab/dtd", "misc/winogavil")]
    rows.append(row("misc/winogavil", None))
    found, absent = aggregates(rows), missing(rows)
    assert {name for name, value in found.items() if value is not None} == {
        "ImageNet",
        "ImageNet dist. shifts",
        "IN & Variants",
    }
    assert absent["VTAB"] == ["vtab/dtd"]
    assert absent["Retrieval"] == ["misc/winogavil"]
    assert absent["Average"] == ["vtab/dtd", "misc/winogavil"]
    assert absent["ImageNet"] == []


def test_protoclip_and_coco_average_their_own_metrics():
    """Top-1 over the ten sets, also where the main metric is another; the six recalls of COCO."""
    tens = [row(task.key, 0.0, acc1=i / 10) for i, task in enumerate(expand(["protoclip"]))]
    recall = {f"{what}_retrieval_recall@{k}": k / 20 for what in ("image", "text") for k in (1, 5, 10)}
    found = aggregates([*tens, row("coco", 0.0, **recall)])
    assert found["ProtoCLIP zero-shot"] == pytest.approx(0.45)
    assert found["COCO mean recall"] == pytest.approx((1 + 5 + 10) / 20 / 3)


def test_every_model_and_step_has_its_entry(tmp_path):
    """In the order of results.jsonl; an average without any of its tasks lacks none by name. Nothing else is left."""
    rows = [row("imagenet1k", 0.25, step=100), row("imagenet1k", 0.5, step=200), row("objectnet", 0.75, step=200)]
    write_aggregates([*rows, row("my_own_set", 0.5, step=300)], tmp_path)
    first, second, third = json.loads((tmp_path / "aggregate.json").read_text())
    assert (first["step"], first["aggregates"]) == (100, aggregates(rows[:1]))
    assert (second["model"], second["step"], second["weights"]) == ("run", 200, "00")
    assert second["aggregates"] == aggregates(rows[1:]) == dict.fromkeys(AVERAGES) | {"ImageNet": 0.5}
    shifts = "ImageNet dist. shifts"
    assert second["missing"].keys() == {shifts, "IN & Variants", "Average"}
    assert second["missing"][shifts] == ["imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r"]
    assert (third["aggregates"], third["missing"]) == (dict.fromkeys(AVERAGES), {})
    assert [path.name for path in tmp_path.iterdir()] == ["aggregate.json"]


def test_other_weights_under_the_same_name_are_another_model(tmp_path):
    """A run that was trained again: its numbers are not averaged with the old ones."""
    rows = [row("imagenet1k", 0.5), row("objectnet", 0.5) | {"weights": "11"}]
    write_aggregates(rows, tmp_path)
    weights = [entry["weights"] for entry in json.loads((tmp_path / "aggregate.json").read_text())]
    assert weights == ["00", "11"]
