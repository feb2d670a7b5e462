"""kd-accel eval: rows of results.jsonl, where they go, and what is said when a model or a set is broken."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch

from kd_accel.eval_config import EvalConfig, MeasureConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.find import find_sets
from kd_accel.evals.suite import evaluate, run, table
from kd_accel.models.towers import to_model_input
from kd_accel.schema import ConfigError

RECALLS = [f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)]


@pytest.fixture
def sets(tmp_path, write_benchmark, labelled, captioned):
    """A folder of a zero-shot set of 7 images and a retrieval set of 6."""
    write_benchmark(tmp_path / "sets" / "things", labelled([0, 1, 2, 3, 4, 5, 0]), num_classes=6)
    return write_benchmark(tmp_path / "sets" / "pairs", captioned([1, 2, 1, 3, 1, 1])).parent


def evaluated(encoder, folder, **loading):
    return list(evaluate(encoder, find_sets(folder), MeasureConfig(data=str(folder), **loading)))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_per_set_beside_the_release(tmp_path, release, sets, capsys):
    """results.jsonl grows by one row per set, each with all its keys; the table shows both tasks."""
    model = shutil.copytree(release, tmp_path / "mine")
    run(EvalConfig(model=str(model), data=str(sets), batch_size=4, num_workers=0))
    run(EvalConfig(model=str(model), data=str(sets / "things"), batch_size=4, num_workers=0))
    rows = rows_of(model / "results.jsonl")
    assert [(r["model"], r["step"], r["dataset"], r["task"], r["n"], r["bad"]) for r in rows] == [
        ("mine", None, "pairs", "retrieval", 6, 0),
        ("mine", None, "things", "zero_shot", 7, 0),
        ("mine", None, "things", "zero_shot", 7, 0),
    ]
    assert list(rows[0]["metrics"]) == RECALLS
    assert list(rows[1]["metrics"]) == ["acc1", "acc5", "mean_per_class_recall"]
    assert {**rows[1], "seconds": 0} == {**rows[2], "seconds": 0}
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
    assert [(row["model"], row["step"]) for row in rows] == [("small", 20), ("small", 10), ("small", 10)]


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
        [row] = evaluated(encoder, folder, batch_size=2, num_workers=2)
    assert (row["n"], row["bad"]) == (4, 1)
    assert "s0002: image cannot be decoded" in caplog.text


def test_a_set_of_corrupt_images_is_an_error(encoder, tmp_path, write_benchmark, captioned):
    """Nothing to measure is not a recall of 0."""
    samples = {key: {**members, "png": b"junk"} for key, members in captioned([1, 1]).items()}
    with pytest.raises(ConfigError, match="none of its 2 images is readable; the first: s0000"):
        evaluated(encoder, write_benchmark(tmp_path / "set", samples), batch_size=2, num_workers=0)


@pytest.mark.parametrize(("tower", "said"), [("visual", "image features of things"), ("text", "text features")])
def test_features_that_are_not_finite_name_the_model(release, sets, tower, said):
    """A diverged checkpoint must not be scored: every comparison with NaN is false, and class 0 would win."""
    encoder = load_encoder(release)
    parts = [p for name, p in encoder.image.model.named_parameters() if ("visual" in name) == (tower == "visual")]
    for parameter in parts:
        parameter.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match=rf"untrained: .* {said}.* not finite"):
        evaluated(encoder, sets / "things", batch_size=4, num_workers=0)


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


def test_real_sets(encoder, data_root):
    """Real folders load whole: sizes as documented, and an untrained model is near chance."""
    [flowers] = evaluated(encoder, data_root / "zeroshot" / "flowers5", batch_size=128, num_workers=0)
    assert (flowers["task"], flowers["n"], flowers["bad"]) == ("zero_shot", 736, 0)
    assert flowers["metrics"]["acc5"] == 1
    assert flowers["metrics"]["acc1"] < 0.45  # chance is 0.2
    [pairs] = evaluated(encoder, str(data_root / "pairs" / "val"), batch_size=128, num_workers=0)
    assert (pairs["task"], pairs["n"], pairs["bad"]) == ("retrieval", 596, 0)
    assert pairs["metrics"]["text_retrieval_recall@10"] < 0.1  # chance is 0.017
