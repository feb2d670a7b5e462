"""When a row of results.jsonl is taken as it is, and when its set is measured again."""

from __future__ import annotations

import json
import shutil

import pytest

from kd_accel.eval_config import EvalConfig
from kd_accel.evals.suite import run


@pytest.fixture
def evaluated(release, tmp_path):
    """A function: folder -> the numbers of images of all rows in results.jsonl after its evaluation."""

    def evaluate(folder) -> list[int]:
        output = tmp_path / "results.jsonl"
        run(EvalConfig(model=str(release), data=str(folder), batch_size=4, num_workers=0, output=str(output)))
        return [json.loads(line).get("n") for line in output.read_text().splitlines()]

    return evaluate


def test_another_set_of_the_same_name_is_measured(tmp_path, evaluated, write_benchmark, captioned):
    """Retrieval sets have neither class names nor templates to be told apart by."""
    assert evaluated(write_benchmark(tmp_path / "a" / "val", captioned([1, 2, 1]))) == [3]
    assert evaluated(write_benchmark(tmp_path / "b" / "val", captioned([1, 2, 1, 1]))) == [3, 4]
    assert evaluated(tmp_path / "b" / "val") == [3, 4]  # known


def test_a_repaired_set_is_measured(tmp_path, evaluated, write_benchmark, captioned):
    """An image that was unreadable counts as soon as it can be read."""
    samples = captioned([1, 2, 1])
    broken = write_benchmark(tmp_path / "set", samples | {"s0001": samples["s0001"] | {"png": b"no image"}})
    assert evaluated(broken) == [2]
    assert evaluated(write_benchmark(broken, samples)) == [2, 3]


def test_a_changed_truth_is_measured(tmp_path, evaluated, write_benchmark, labelled):
    """The images' places may be the same."""
    folder = write_benchmark(tmp_path / "set", labelled([0, 1, 2]), num_classes=3)
    assert evaluated(folder) == [3]
    assert evaluated(write_benchmark(folder, labelled([0, 1, 1]), num_classes=3)) == [3, 3]


def test_rows_of_an_earlier_version_are_passed_over(tmp_path, evaluated, write_benchmark, captioned):
    """They have no key."""
    row = {"model": "untrained", "step": None, "task": "retrieval", "dataset": "set", "n": 9, "bad": 0, "metrics": {}}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert evaluated(write_benchmark(tmp_path / "set", captioned([1, 2]))) == [9, 2]


def test_tables_that_a_killed_evaluation_did_not_write(tmp_path, evaluated, write_benchmark, captioned):
    """They are made of the known rows."""
    folder = write_benchmark(tmp_path / "set", captioned([1, 2]))
    evaluated(folder)
    tables = {
        path: path.read_bytes() for path in (tmp_path / "evaluation_metrics_all.csv", tmp_path / "aggregate.json")
    }
    for path in tables:
        path.unlink()
    shutil.rmtree(tmp_path / "eval_results")
    assert evaluated(folder) == [2]
    assert {path: path.read_bytes() for path in tables} == tables
    assert (tmp_path / "eval_results").is_dir()
