"""A folder in DataComp's layout gives DataComp's rows: keys, titles, groups by metadata, main metrics, averages."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.plan import make_plan
from kd_accel.evals.tasks import expand
from kd_accel.schema import ConfigError

FACES = {"race": 3, "gender": 2, "age": 3, "toxic": 21}  # classes of each of the four classifiers


def with_metadata(samples: dict, rows: list[list[int]]) -> dict:
    """The samples, each with its KEY.npy."""
    for members, row in zip(samples.values(), rows, strict=True):
        file = io.BytesIO()
        np.save(file, np.array(row))
        members["npy"] = file.getvalue()
    return samples


@pytest.fixture
def datacomp(tmp_path, write_benchmark, write_tar, picture, labelled, captioned):
    """Six of the 40 sets, of six images each, but WinoGAViL's twelve."""
    root, labels = tmp_path / "datacomp", [0, 1, 2, 0, 1, 2]
    write_benchmark(root / "wds_imagenet1k_test", labelled(labels), num_classes=6)
    write_benchmark(root / "wds_objectnet_test", labelled(labels), num_classes=6)
    regions = with_metadata(labelled(labels), [[region, 14, 0] for region in (0, 0, 1, 1, 5, 5)])
    write_benchmark(root / "wds_wilds-fmow_test", regions, num_classes=6)
    people = with_metadata(labelled([0] * 6), [[age, age % 2, age, int(age != 1)] for age in (0, 1, 2, 0, 1, 2)])
    faces = write_benchmark(root / "wds_fairface_test", people, num_classes=1)
    names = [f"{what}:{i}\n" for what, count in FACES.items() for i in range(count)]
    (faces / "classnames.txt").write_text("".join(names))
    (faces / "zeroshot_classification_templates.txt").write_text("".join(f"{what}:a {{c}}.\n" for what in FACES))
    write_benchmark(root / "wds_retrieval-mscoco_2014_5k_test_image_text_retrieval_test", captioned([2] * 6))
    write_tar(root / "wds_misc-winogavil_test/test/0.tar", {f"p{i}": {"png": picture(i)} for i in range(12)})
    (root / "wds_misc-winogavil_test/test/nshards.txt").write_text("1")
    keys = [f"p{i}" for i in range(12)]
    questions = [{"cue": "Ice", "candidates": keys[:n], "associations": keys[: n // 2]} for n in (5, 10, 12)]
    (root / "wds_misc-winogavil_test/questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return root


def test_six_of_forty_rows(encoder, datacomp, tmp_path):
    """Each under its key and title with its own main metric; the other 34 are skipped, and averages wait for them."""
    config = MeasureConfig(data=str(datacomp), tasks=["datacomp38"], batch_size=4, num_workers=0)
    plan = make_plan(config)
    output = tmp_path / "out" / "results.jsonl"
    output.parent.mkdir()
    rows = {row["key"]: row for row, _ in evaluate(encoder, plan.jobs, config, output=output)}

    tasks = {task.key: task for task in expand(["datacomp38"])}
    assert {key: row["dataset"] for key, row in rows.items()} == {
        "imagenet1k": "ImageNet 1k",
        "objectnet": "ObjectNet",
        "wilds/fmow": "FMoW",
        "fairness/fairface": "FairFace",
        "retrieval/mscoco_2014_5k_test_image_text_retrieval": "MSCOCO",
        "misc/winogavil": "WinoGAViL",
    }
    assert plan.skipped.keys() == tasks.keys() - rows.keys()
    for key, row in rows.items():
        name = tasks[key].main_metric
        assert row["metrics"]["main_metric"] == (None if name is None else row["metrics"][name])
    fmow, face = rows["wilds/fmow"]["metrics"], rows["fairness/fairface"]["metrics"]
    regions = [fmow[f"acc_region:{region}"] for region in (0, 1, 5)]
    assert (fmow["acc_worst_region"], fmow["count_region:5"]) == (min(regions), 2)
    assert {"acc_race_wg", "acc_gender_x_race:1_gender:1", "toxicity_crime_avg"} < face.keys()
    assert "acc1" not in face
    jaccard = rows["misc/winogavil"]["metrics"]
    tens = (jaccard["jaccard_score_10"] + jaccard["jaccard_score_12"]) / 2
    assert jaccard["main_metric"] == pytest.approx(tens)
    assert jaccard["jaccard_score_6"] is None

    [entry] = json.loads((output.parent / "aggregate.json").read_text())
    assert entry["aggregates"]["ImageNet"] == rows["imagenet1k"]["metrics"]["acc1"]
    absent = ["imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r"]
    assert entry["missing"]["ImageNet dist. shifts"] == absent
    assert len(entry["missing"]["Average"]) == 38 - 5


def test_a_group_task_without_metadata_is_one_line(encoder, datacomp, tmp_path, write_benchmark, labelled):
    """It names the columns; the other sets have their rows."""
    write_benchmark(datacomp / "wds_wilds-fmow_test", labelled([0, 1]), num_classes=6)
    config = MeasureConfig(data=str(datacomp), tasks=["wilds/fmow", "imagenet"], batch_size=4, num_workers=0)
    with pytest.raises(ConfigError, match="wilds/fmow needs the columns region, year$"):
        list(evaluate(encoder, make_plan(config).jobs, config, output=tmp_path / "results.jsonl"))
    [row] = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["key"] == "imagenet1k"
