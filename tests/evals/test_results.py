"""results.jsonl and the tables made from it: whole lines from several writers, newest rows, nothing lost."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys

import pytest
from conftest import REPO

from kd_accel.evals.results import append_row, columns, finished, read_results, write_tables
from kd_accel.text_files import read_rows


def row(key="vtab/cifar100", step=10, *, model="run", task="zero_shot", weights="w1", **metrics):
    metrics = metrics or {"acc1": 0.5, "main_metric": 0.5}
    about = {"model": model, "step": step, "key": key, "dataset": key.upper(), "task": task}
    return about | {"n": 7, "bad": 0, "metrics": metrics, "weights": weights, "seconds": 1.5}


@pytest.fixture
def results(tmp_path):
    """results.jsonl of a run with the name that `row` gives its model."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "results.jsonl"


def test_the_line_of_a_killed_process_goes_away(results):
    """A torn last line, however it begins, is neither read nor glued to the next row."""
    append_row(results, row("a"))
    for torn in ('{"model": "run", "st', "x" * 100_000, "{}"):
        with results.open("a") as file:
            file.write(torn)
        assert [r["key"] for r in read_results(results)] == ["a"]
    append_row(results, row("b"))
    assert [r["key"] for r in read_rows(results)] == ["a", "b"]
    results.write_text('{"torn": ')  # and nothing before it
    append_row(results, row("c"))
    assert [r["key"] for r in read_rows(results)] == ["c"]


def test_rows_of_earlier_versions_count_for_nothing(results):
    """They say neither key nor weights; they stay in the file."""
    results.write_text('{"model": "run", "step": 10, "task": "zero_shot", "dataset": "a", "metrics": {"acc1": 1}}\n')
    append_row(results, row("a"))
    assert read_results(results) == [row("a")]
    assert len(read_rows(results)) == 2


def test_a_row_that_the_disk_does_not_take_leaves_no_trace(results, monkeypatch):
    """Half a line is written, then the disk is full: OSError, and the file is what it was."""
    append_row(results, row("a"))
    before, write = results.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match="No space left"):
        append_row(results, row("b"))
    assert results.read_bytes() == before


def test_metrics_that_are_not_finite_are_null(results):
    """JSON has no NaN."""
    append_row(results, row(gap=math.nan, far=math.inf, acc5=None, acc1=0.25))
    assert read_results(results)[0]["metrics"] == {"gap": None, "far": None, "acc5": None, "acc1": 0.25}


WRITER = """
import sys
import time
from pathlib import Path
from evals.test_results import row
from kd_accel.evals.evaluate import _record
results, name = Path(sys.argv[1]), sys.argv[2]
(results.parent / f"{name}.ready").touch()
while len(list(results.parent.glob("*.ready"))) < 2:
    time.sleep(0.001)
for number in range(40):
    _record(row(f"{name}{number}") | {"note": "x" * 5000}, None, results)
"""


def test_two_evaluations_at_once_lose_no_row(results):
    """Both add rows and make tables and averages, as every row does; the last to end finds all rows."""
    env = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", WRITER, results, name], env=env) for name in "ab"]
    assert [process.wait(240) for process in started] == [0, 0]
    keys = {f"{name}{number}" for name in "ab" for number in range(40)}
    assert {r["key"] for r in read_results(results)} == keys
    [line] = table(results)
    assert {name.partition("/")[0] for name in line} - {"model", "step"} == keys
    assert not list(results.parent.rglob("*.tmp"))


def test_the_newest_row_counts(results):
    """Of each model, step, key and task; rows of others stay."""
    rows = [row("a", acc1=0.1), row("a", 20, acc1=0.2), row("b", acc1=0.3), row("a", acc1=0.4, weights="w2")]
    rows += [row("a", model="teacher", acc1=0.5), row("a", task="linear_probe", acc1=0.6)]
    for r in rows:
        append_row(results, r)
    assert [r["metrics"]["acc1"] for r in read_results(results)] == [0.2, 0.3, 0.4, 0.5, 0.6]


def test_finished_tasks_are_of_the_same_weights(results):
    """Another model, step or weights: to be evaluated again."""
    for r in (row("a"), row("b", weights="w2"), row("c", 20), row("d", model="x"), row("e", task="retrieval")):
        append_row(results, r)
    done = finished(read_results(results), model="run", step=10, weights="w1")
    assert list(done) == [("a", "zero_shot"), ("e", "retrieval")]
    assert done["a", "zero_shot"] == row("a")
    assert finished(read_results(results.with_name("none")), model="run", step=10, weights="w1") == {}


def table(results):
    with (results.parent / "evaluation_metrics_all.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_the_union_of_all_columns(results):
    """A line per model and step, in order; a metric without value is an empty cell; a probe does not hide zero-shot."""
    append_row(results, row("b/c", 20, acc1=0.25, acc5=None))
    append_row(results, row("b/c", 20, task="linear_probe", acc1=0.75))
    append_row(results, row("a", 3, acc1=1.0))
    append_row(results, row("a", None, model="ViT,openai", acc1=0.1))
    write_tables(results)
    assert table(results) == [
        {"model": "ViT,openai", "step": "", "a/acc1": "0.1", "b/c/acc1": "", "b/c/linear_probe/acc1": ""},
        {"model": "run", "step": "3", "a/acc1": "1.0", "b/c/acc1": "", "b/c/linear_probe/acc1": ""},
        {"model": "run", "step": "20", "a/acc1": "", "b/c/acc1": "0.25", "b/c/linear_probe/acc1": "0.75"},
    ]
    assert list(table(results)[0]) == ["model", "step", "a/acc1", "b/c/acc1", "b/c/linear_probe/acc1"]
    assert columns(row("a", acc1=0.5, acc5=None)) == {"a/acc1": 0.5}


def test_a_restart_loses_nothing(results):
    """The table is made from the file alone: a lost one comes back, with rows of before."""
    append_row(results, row("a"))
    write_tables(results)
    (results.parent / "evaluation_metrics_all.csv").unlink()
    append_row(results, row("b"))
    write_tables(results)
    assert {"a/acc1", "b/acc1"} < set(table(results)[0])


def test_files_for_datacomps_tools(results):
    """key, dataset and metrics with main_metric; the run's own by step, other models in folders, no linear probes."""
    for r in (row("a"), row("b", 20), row("a", None, model="hf/clip"), row("a", task="linear_probe"), row("a", acc1=0)):
        append_row(results, r)
    write_tables(results)
    folder = results.parent / "eval_results"
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.jsonl")}
    assert sorted(files) == ["hf-clip/eval_results.jsonl", "step_10_eval_results.jsonl", "step_20_eval_results.jsonl"]
    assert json.loads(files["step_10_eval_results.jsonl"]) == {"key": "a", "dataset": "A", "metrics": {"acc1": 0}}
    written = {"key": "b", "dataset": "B", "metrics": {"acc1": 0.5, "main_metric": 0.5}}
    assert json.loads(files["step_20_eval_results.jsonl"]) == written
