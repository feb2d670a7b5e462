"""kd-accel eval: rows of results.jsonl, where they go, and what is said when a model or a set is broken."""

from __future__ import annotations

import io
import json
import logging
import shutil

import numpy as np
import pytest
import torch

from kd_accel.eval_config import EvalConfig, MeasureConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.plan import make_plan
from kd_accel.evals.suite import run
from kd_accel.evals.table import in_words, table
from kd_accel.models.image import to_model_input
from kd_accel.schema import ConfigError

RECALLS = [f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)]


@pytest.fixture
def sets(tmp_path, write_benchmark, labelled, captioned):
    """A folder of a zero-shot set of 7 images and a retrieval set of 6."""
    write_benchmark(tmp_path / "sets" / "things", labelled([0, 1, 2, 3, 4, 5, 0]), num_classes=6)
    return write_benchmark(tmp_path / "sets" / "pairs", captioned([1, 2, 1, 3, 1, 1])).parent


def evaluated(encoder, folder, output, **options):
    """The rows of every set in a folder."""
    config = MeasureConfig(data=str(folder), **options)
    return [row for row, _ in evaluate(encoder, make_plan(config).jobs, config, output=output / "results.jsonl")]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_per_set_beside_the_release(tmp_path, release, sets, capsys):
    """results.jsonl grows by one row per set, each with all its keys; the table shows both tasks."""
    model = shutil.copytree(release, tmp_path / "mine")
    run(EvalConfig(model=str(model), data=str(sets), batch_size=4, num_workers=0))
    run(EvalConfig(model=str(model), data=str(sets / "things"), batch_size=4, num_workers=0))
    rows = rows_of(model / "results.jsonl")
    assert [(r["model"], r["step"], r["key"], r["dataset"], r["task"], r["n"], r["bad"]) for r in rows] == [
        ("mine", None, "pairs", "pairs", "retrieval", 6, 0),
        ("mine", None, "things", "things", "zero_shot", 7, 0),
    ]
    ranks = ["mean_recall@1", "image_mean_rank", "text_mean_rank"]
    assert list(rows[0]["metrics"]) == [*RECALLS, *ranks, "main_metric"]
    classes = ["acc1", "acc5", "mean_per_class_recall", "balanced_accuracy", "f1_macro"]
    assert list(rows[1]["metrics"]) == [*classes, "main_metric"]
    printed = capsys.readouterr().out
    assert "things: acc1 " in printed
    assert "\nretrieval  images  unreadable  image R@1 %" in printed


def test_a_run_is_evaluated_at_its_newest_checkpoint(tmp_path, release, sets):
    """Run, checkpoint and its student/ are one model: the run's name, the step, and rows in the run's results.jsonl."""
    checkpoints = tmp_path / "runs" / "small" / "checkpoints"
    for step in ("step_00000010", "step_00000020"):
        shutil.copytree(release, checkpoints / step / "student")
    (checkpoints / "latest").write_text("step_00000020")
    for model in (checkpoints.parent, checkpoints / "step_00000010", checkpoints / "step_00000010" / "student"):
        run(EvalConfig(model=str(model), data=str(sets / "things"), batch_size=4, num_workers=0))
    rows = rows_of(checkpoints.parent / "results.jsonl")
    assert [(row["model"], row["step"]) for row in rows] == [("small", 20), ("small", 10)]


def test_what_has_a_row_is_not_measured_again(tmp_path, release, sets, capsys):
    """Unless again=true, or something that decides the row is another: weights, class names, what is asked for."""
    model = shutil.copytree(release, tmp_path / "mine")

    def rows_after(**options):
        config = EvalConfig(model=str(model), data=str(sets / "things"), batch_size=4, num_workers=0, **options)
        assert run(config) == 0
        return len(rows_of(model / "results.jsonl"))

    assert rows_after() == rows_after() == 1
    assert "; known already" in capsys.readouterr().out
    assert rows_after(clusters=True) == rows_after(clusters=True) == 2
    assert rows_after(again=True) == 3
    assert rows_after(precision="bf16") == 4
    (sets / "things" / "classnames.txt").write_text("\n".join("abcdef"))
    assert rows_after() == 5


def test_a_task_without_data_is_skipped(tmp_path, release, write_benchmark, labelled, capsys):
    """The others are evaluated, the places are named, the exit code says so, and the average is None."""
    model = shutil.copytree(release, tmp_path / "mine")
    write_benchmark(tmp_path / "sets" / "wds_mnist_test", labelled([0, 1, 2]), num_classes=3)
    asked = EvalConfig(model=str(model), data=str(tmp_path / "sets"), tasks=["mnist", "vtab"], num_workers=0)
    assert run(asked) == 3
    assert f"skipped vtab/dtd: looked for {tmp_path / 'sets' / 'wds_vtab-dtd_test'}" in capsys.readouterr().out
    [row] = rows_of(model / "results.jsonl")
    assert (row["key"], row["dataset"], row["metrics"]["main_metric"]) == ("mnist", "MNIST", row["metrics"]["acc1"])
    [entry] = json.loads((model / "aggregate.json").read_text())
    assert entry["aggregates"]["VTAB"] is None
    with pytest.raises(ConfigError, match="none of the 13 tasks has its set"):
        run(asked.model_copy(update={"tasks": ["vtab"]}))


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (("wds_mnist_test", "wds_vtab-dtd_test"), ["mnist", "vtab/dtd"]),
        (("mnist", "wds_mnist_test"), ["mnist", "wds_mnist_test"]),
    ],
)
def test_folders_with_datacomps_names_are_its_tasks(tmp_path, write_benchmark, labelled, names, keys):
    """Unless two would be one task."""
    for name in names:
        write_benchmark(tmp_path / "sets" / name, labelled([0, 1]), num_classes=2)
    assert [job.key for job in make_plan(MeasureConfig(data=str(tmp_path / "sets"))).jobs] == keys


def test_a_damaged_set_does_not_stop_the_others(tmp_path, release, sets, write_benchmark, captioned):
    """It is an error at the end, and the rows of the others are there."""
    junk = {key: {**members, "png": b"junk"} for key, members in captioned([1, 1]).items()}
    write_benchmark(sets / "a_broken_one", junk)
    output = tmp_path / "rows"
    with pytest.raises(ConfigError, match="a_broken_one: none of its 2 images is readable") as error:
        run(EvalConfig(model=str(release), data=str(sets), num_workers=0, output=str(output)))
    assert len(str(error.value).splitlines()) == 1
    assert [row["key"] for row in rows_of(output)] == ["pairs", "things"]


def test_truth_in_metadata_alone(tmp_path, release, sets, write_benchmark, labelled):
    """DataComp's FairFace has no .cls, and needs none; a set that is asked for its classes does."""
    samples = labelled([0, 1])
    for members in samples.values():
        file = io.BytesIO()
        np.save(file, np.zeros(4, dtype=np.int64))
        members["npy"] = file.getvalue()
        del members["cls"]
    folder = write_benchmark(sets / "wds_fairface_test", samples, num_classes=2)
    [job] = make_plan(MeasureConfig(data=str(folder))).jobs
    assert [(sample.label, sample.meta) for sample in job.test.samples()] == [(None, (0, 0, 0, 0))] * 2
    folder.rename(sets / "anything")
    with pytest.raises(ConfigError, match="s0000.cls, the class index, is missing"):
        run(EvalConfig(model=str(release), data=str(sets / "anything"), output=str(tmp_path / "rows"), num_workers=0))


def test_everything_that_may_be_asked_of_a_set(tmp_path, release, sets, write_benchmark, labelled):
    """Agreement with itself is perfect; a probe, seen classes, clusters and statistics have their numbers."""
    train = labelled([0, 1, 2, 3, 4, 5] * 3)
    write_benchmark(tmp_path / "train", train, num_classes=6)
    shutil.copytree(tmp_path / "train" / "test", sets / "things" / "train")
    (tmp_path / "seen.txt").write_text("thing 0\nthing 1\n")
    asked = {"teacher": str(release), "statistics": True, "clusters": True, "seen_classes": str(tmp_path / "seen.txt")}
    config = EvalConfig(
        model=str(release),
        data=str(sets),
        batch_size=4,
        num_workers=0,
        output=str(tmp_path / "rows"),
        cache=str(tmp_path / "cache"),
        probe={"c": [0.1, 1]},
        **asked,
    )
    assert run(config) == 0
    pairs, things, probe = rows_of(tmp_path / "rows")
    assert (things["task"], probe["task"], probe["key"]) == ("zero_shot", "linear_probe", "things")
    alike = {"teacher_top1_match": 1, "teacher_feature_cosine": pytest.approx(1), "teacher_cka": pytest.approx(1)}
    assert alike.items() <= things["metrics"].items()
    assert {"acc_seen", "acc_unseen", "harmonic_mean", "adjusted_rand_index"} <= things["metrics"].keys()
    assert {"modality_gap", "image_avg_self_similarity", "teacher_text_cka"} <= pairs["metrics"].keys()
    assert probe["metrics"]["c"] in (0.1, 1)
    written = {path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir()}
    assert written == {"images", "texts", "classes"}
    assert (tmp_path / "examples" / "pairs.json").is_file()


def test_output_is_checked_before_the_work(tmp_path, release, sets):
    """A folder cannot take rows; a new path is made."""
    with pytest.raises(ConfigError, match="output: .* cannot be written"):
        run(EvalConfig(model=str(release), data=str(sets), output=str(tmp_path)))
    new = tmp_path / "new" / "rows.jsonl"
    run(EvalConfig(model=str(release), data=str(sets / "things"), num_workers=0, output=str(new)))
    assert len(rows_of(new)) == 1


def test_a_corrupt_image_is_counted_and_named(encoder, tmp_path, write_benchmark, labelled, caplog):
    """The other images count; the row says how many did not, and the log says which."""
    samples = labelled([0, 1, 2, 0, 1])
    samples["s0002"]["png"] = samples["s0002"]["png"][:-40]
    folder = write_benchmark(tmp_path / "set", samples, num_classes=3)
    with caplog.at_level(logging.WARNING):
        [row] = evaluated(encoder, folder, tmp_path, batch_size=2, num_workers=2)
    assert (row["n"], row["bad"]) == (4, 1)
    assert "s0002: image cannot be decoded" in caplog.text


def test_a_set_of_corrupt_images_is_an_error(encoder, tmp_path, write_benchmark, captioned):
    """Nothing to measure is not a recall of 0."""
    samples = {key: {**members, "png": b"junk"} for key, members in captioned([1, 1]).items()}
    with pytest.raises(ConfigError, match="none of its 2 images is readable; the first: s0000"):
        evaluated(encoder, write_benchmark(tmp_path / "set", samples), tmp_path, batch_size=2, num_workers=0)


@pytest.mark.parametrize(("tower", "said"), [("visual", "image features of things"), ("text", "text features")])
def test_features_that_are_not_finite_name_the_model(release, sets, tower, said):
    """A diverged checkpoint must not be scored: every comparison with NaN is false, and class 0 would win."""
    encoder = load_encoder(release)
    parts = [p for name, p in encoder.image.model.named_parameters() if ("visual" in name) == (tower == "visual")]
    for parameter in parts:
        parameter.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match=rf"untrained: .* {said}.* not finite"):
        evaluated(encoder, sets / "things", sets, batch_size=4, num_workers=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_raw_and_fp32(release, precision):
    """Whatever the towers' precision; the values are the towers' own."""
    encoder = load_encoder(release, precision=precision)
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = encoder.encode_images(views)
    with torch.no_grad():
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        raw = encoder.image.model.encode_image(to_model_input(views, encoder.image_input, dtype))
    torch.testing.assert_close(features, raw.float())
    assert encoder.encode_texts(["a cat", ""]).dtype == torch.float32


def test_the_table_is_aligned():
    """Every line of a task is as wide as its head, and a metric that does not exist is a dash."""
    metrics = {"acc1": 1.0, "acc5": None, "mean_per_class_recall": 0.125}
    rows = [
        {"task": "zero_shot", "dataset": name, "n": 7, "bad": 0, "metrics": metrics} for name in ("a", "a longer name")
    ]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a", "7", "0", "100.00", "-", "12.50"]


def test_seen_and_unseen_classes_are_shown_where_they_were_asked_for():
    """As columns, and in the line about a row; a set without unseen classes has a dash."""
    usual = {"acc1": 0.5, "acc5": 1.0, "mean_per_class_recall": 0.5}
    gzsl = {"acc_seen": 0.75, "acc_unseen": 0.25, "harmonic_mean": 0.375}
    asked, without, all_seen = (
        {"task": "zero_shot", "dataset": name, "n": 7, "bad": 0, "metrics": usual | metrics}
        for name, metrics in {
            "asked": gzsl,
            "without": {},
            "all_seen": gzsl | {"acc_unseen": None, "harmonic_mean": None},
        }.items()
    )
    head, *lines = (line.split() for line in table([asked, without, all_seen]).splitlines())
    assert head[-6:] == ["acc_seen", "%", "acc_unseen", "%", "harmonic_mean", "%"]
    assert [line[-3:] for line in lines] == [["75.00", "25.00", "37.50"], ["-", "-", "-"], ["75.00", "-", "-"]]
    assert "acc_seen" not in table([without])
    assert "acc_seen 75.00 %, acc_unseen 25.00 %, harmonic_mean 37.50 %; 7 images" in in_words(asked)
    assert "unseen" not in in_words(without)


def test_real_sets(encoder, data_root, tmp_path):
    """Real folders load whole: sizes as documented, and an untrained model is near chance."""
    [flowers] = evaluated(encoder, data_root / "zeroshot" / "flowers5", tmp_path, batch_size=128, num_workers=0)
    assert (flowers["task"], flowers["n"], flowers["bad"]) == ("zero_shot", 736, 0)
    assert flowers["metrics"]["acc5"] == 1
    assert flowers["metrics"]["acc1"] < 0.45  # chance is 0.2
    [pairs] = evaluated(encoder, data_root / "pairs" / "val", tmp_path, batch_size=128, num_workers=0)
    assert (pairs["task"], pairs["n"], pairs["bad"]) == ("retrieval", 596, 0)
    assert pairs["metrics"]["text_retrieval_recall@10"] < 0.1  # chance is 0.017
