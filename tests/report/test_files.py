"""Beside the page lie all numbers, as pandas reads them, and the curves as PNG."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from report_run import make_run, report, result, write_rows

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")


def read(path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_number_is_a_line(tmp_path):
    """Of training and of evaluation, unrounded; null is no value; text and truth values are no numbers."""
    folder = make_run(tmp_path / "a, b", results=[result(None, 1 / 3, dataset="vtab/x", acc5=None)])
    write_rows(folder / "metrics.jsonl", [{"step": 5, "loss": 1e-17}, {"step": 6, "loss": None, "note": "x"}])
    report(tmp_path, folder)
    train = {"run": "a, b", "model": "", "task": "train", "key": ""}
    evaluation = {"run": "a, b", "model": "m", "step": "", "task": "zero_shot", "key": "vtab/x"}
    assert read(tmp_path / "metrics.csv") == [
        train | {"step": "5", "metric": "loss", "value": "1e-17"},
        train | {"step": "6", "metric": "loss", "value": ""},
        train | {"step": "6", "metric": "note", "value": ""},
        evaluation | {"metric": "acc1", "value": str(1 / 3)},
        evaluation | {"metric": "acc5", "value": ""},
        evaluation | {"metric": "main_metric", "value": str(1 / 3)},
    ]


def test_long_runs_are_written_whole(tmp_path):
    """The curves are thinned out, the numbers are not."""
    folder = make_run(tmp_path / "a")
    write_rows(folder / "metrics.jsonl", [{"step": step, "loss": step / 7} for step in range(20_000)])
    report(tmp_path, folder)
    assert len(read(tmp_path / "metrics.csv")) == 20_000
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_every_curve_is_a_file_of_its_own(tmp_path):
    """Named after its metric, whatever that is; two metrics of one file name, whatever their case, are two files."""
    folder = make_run(tmp_path / "a")
    names = ["loss/clip", "loss_clip", "Loss/clip", "../up", "..", "e" * 300]
    write_rows(folder / "metrics.jsonl", [{"step": step} | dict.fromkeys(names, 1.0) for step in (1, 2)])
    report(tmp_path, folder)
    files = sorted(path.name for path in (tmp_path / "report_figures").iterdir())
    assert files == sorted(
        ["loss_clip.png", "Loss_clip_2.png", "loss_clip_3.png", "up.png", "panel.png", f"{'e' * 80}.png"]
    )


def test_pandas_reads_it_as_the_document_says(tmp_path):
    """The lines of docs/report.md, run on the numbers of two runs."""
    pandas = pytest.importorskip("pandas")
    runs = [make_run(tmp_path / name, results=[result(2, 0.5)], steps=(1, 2)) for name in ("a", "b")]
    report(tmp_path, *runs)
    text = (Path(__file__).resolve().parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\nimport pandas\n(.*?)^```$", text, flags=re.M | re.S)
    reading, *tables = [line for line in block.splitlines() if line]
    assert reading == 'numbers = pandas.read_csv("metrics.csv")'
    numbers = pandas.read_csv(tmp_path / "metrics.csv")
    training, evaluation = (eval(line, {"numbers": numbers}) for line in tables)
    assert training["loss", "b"].tolist() == [3.0, 1.5]
    assert evaluation.loc[("digits", "zero_shot"), ("a", 2)] == 0.5
