"""The evaluation table compares models task by task, honestly: newest rows, the right direction, teachers apart."""

from __future__ import annotations

import json
import re

import pytest
import torch
import torch.nn.functional as F
from report_run import Page, make_run, report, result

from kd_accel.evals.coco_keys import PERCENT, coco_keys
from kd_accel.evals.retrieval import recall
from kd_accel.evals.statistics import feature_statistics
from kd_accel.report.numbers import best, is_share, written

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def test_the_newest_result_of_a_step_counts_and_the_best_is_bold(tmp_path):
    """A repeated evaluation replaces the earlier one, whatever it was; bold marks the best column only."""
    weak = make_run(tmp_path / "weak", results=[result(3, 0.99, n=10), result(3, 0.25)])
    good = make_run(tmp_path / "good", results=[result(3, 0.75)])
    page = report(tmp_path, weak, good)
    assert "25.0" in page.text
    assert "99.0" not in page.text
    assert page.bold == ["75.0", "75.0"]  # in the table of main metrics, and among all metrics


def test_a_column_is_the_newest_step(tmp_path):
    """What was evaluated earlier alone keeps its number and says its step; what nobody has is a dash."""
    results = [result(20, 0.5), result(10, 0.25), result(10, 0.125, dataset="letters")]
    page = report(
        tmp_path, make_run(tmp_path / "a", results=results), make_run(tmp_path / "b", results=[result(5, 0.1)])
    )
    assert page.main_table == [
        ["task", "a step 20", "b step 5"],
        ["digits zero-shot, acc1 %", "50.0", "10.0"],
        ["letters zero-shot, acc1 %", "12.5 at step 10", DASH],
    ]


def test_a_student_is_measured_by_its_teacher(tmp_path):
    """The teacher stands first and does not compete for the best; its student says what it keeps of it."""
    teacher = make_run(tmp_path / "teacher", results=[result(9, 0.8), result(9, 0.5, dataset="letters")])
    student = [result(3, 0.6), result(3, 0.4, dataset="letters")]
    page = report(
        tmp_path,
        make_run(tmp_path / "alone", results=[result(3, 0.4), result(3, 0.45, dataset="letters")]),
        make_run(tmp_path / "kd", results=student, teacher=teacher / "checkpoints/step_00000009/student"),
        teacher,
    )
    assert page.main_table == [
        ["task", "teacher teacher, step 9", "alone step 3", "kd step 3"],
        ["Mean of 2 tasks main metrics, of the tasks that all have", "65.0", "42.5", f"50.0 {MINUS}15.0, 77 %"],
        ["digits zero-shot, acc1 %", "80.0", "40.0", f"60.0 {MINUS}20.0, 75 %"],
        ["letters zero-shot, acc1 %", "50.0", "45.0", f"40.0 {MINUS}10.0, 80 %"],
    ]
    assert page.bold[:3] == ["50.0", "60.0", "45.0"]


def test_a_moved_teacher_is_found_by_its_name(tmp_path):
    """The config names the path that it had on another machine."""
    teacher = make_run(tmp_path / "here/big", results=[result(9, 0.8)])
    student = make_run(tmp_path / "here/kd", results=[result(3, 0.6)], teacher="/there/big/checkpoints/step_00000009")
    page = report(tmp_path, student, teacher)
    assert "Student of big" in page.text
    assert "Teacher of kd" in page.text
    assert f"{MINUS}20.0, 75 %" in page.text


def test_two_of_that_name_are_no_teacher(tmp_path):
    """Which of them it was cannot be told."""
    runs = [make_run(tmp_path / where / "big", results=[result(9, 0.8)]) for where in "ab"]
    student = make_run(tmp_path / "kd", results=[result(3, 0.6)], teacher="/there/big")
    assert "Teacher of" not in report(tmp_path, student, *runs).text


def test_runs_that_teach_each_other_end(tmp_path):
    """A circle of configs is shown as it is."""
    first = make_run(tmp_path / "a", results=[result(1, 0.5)], teacher=tmp_path / "b")
    second = make_run(tmp_path / "b", results=[result(1, 0.25)], teacher=tmp_path / "a")
    assert report(tmp_path, first, second).main_table[0] == ["task", "a teacher, step 1", "b teacher, step 1"]


def test_averages_come_from_aggregate_json(tmp_path):
    """Those of the model and the step that the column shows; an average that is null for all is left out."""
    folder = make_run(tmp_path / "a", results=[result(1, 0.5), result(2, 0.5)])
    entries = [
        {"model": "m", "step": step, "weights": "w", "aggregates": {"VTAB": vtab, "Average": None}, "missing": {}}
        for step, vtab in ((2, 0.75), (1, 0.25))
    ]
    (folder / "aggregate.json").write_text(json.dumps(entries))
    page = report(tmp_path, folder)
    assert page.main_table[1] == ["VTAB average of the suite", "75.0"]
    assert "Average" not in page.section("Evaluation")


def test_lower_is_better_where_it_is(tmp_path):
    """A mean rank of 2 beats one of 30, and neither is a percentage; self-similarity has no best."""
    one = result(1, 0.5, text_mean_rank=2.0, image_avg_self_similarity=0.3)
    other = result(1, 0.5, text_mean_rank=30.5, image_avg_self_similarity=0.9)
    page = report(tmp_path, make_run(tmp_path / "a", results=[one]), make_run(tmp_path / "b", results=[other]))
    fold = (
        re.search(r"All metrics of all tasks.*?</details>", page.source, flags=re.DOTALL).group().replace("<wbr>", "")
    )
    assert "<td>text_mean_rank</td><td class=best>2</td><td class=number>30.5</td>" in fold
    similarity = "<td>image_avg_self_similarity</td><td class=number>0.3</td><td class=number>0.9</td>"
    assert similarity in fold


def test_two_models_of_one_results_file_are_two_columns(tmp_path):
    """output=FILE collects rows of several."""
    rows = [result(None, 0.5, model="ViT-B-32"), result(None, 0.25, model="ViT-S")]
    page = report(tmp_path, make_run(tmp_path / "a", results=rows))
    assert page.main_table[0] == ["task", "a: ViT-B-32 release", "a: ViT-S release"]


def test_a_probe_of_a_set_is_a_row_of_its_own_and_no_part_of_the_mean(tmp_path):
    rows = [result(1, 0.5), result(1, 0.25, dataset="letters"), result(1, 0.875, task="linear_probe")]
    table = report(tmp_path, make_run(tmp_path / "a", results=rows)).main_table
    assert [row[1:] for row in table[1:]] == [["37.5"], ["50.0"], ["25.0"], ["87.5"]]
    assert table[4][0] == "digits linear probe, acc1 %"


def test_rows_of_early_versions_are_read(tmp_path):
    """Without key and main metric: the first metric stands for it."""
    row = {"model": "m", "step": 1, "task": "retrieval", "dataset": "coco", "n": 5, "metrics": {"r1": 0.5, "r5": 0.75}}
    assert report(tmp_path, make_run(tmp_path / "a", results=[row])).main_table[1] == ["coco retrieval, r1 %", "50.0"]


def test_several_steps_become_curves(tmp_path):
    """A panel per task and one of their mean, over the steps that have all; a teacher of one step is level."""
    rows = [result(step, step / 10, dataset=name) for step in (1, 2, 3) for name in ("x", "y")][:-1]
    teacher = make_run(tmp_path / "big", results=[result(9, 0.8, dataset="x")])
    page = report(tmp_path, make_run(tmp_path / "a", results=rows, teacher=teacher), teacher)
    labels = re.findall(r'role=img aria-label="([^"]*)"', page.section("Evaluation"))
    assert labels == [
        "mean of 2 tasks over steps. a: from 0.1 to 0.2",
        "x, zero-shot over steps. big: from 0.8 to 0.8; a: from 0.1 to 0.3",
        "y, zero-shot over steps. a: from 0.1 to 0.2",
    ]


def test_one_step_has_no_curve(tmp_path):
    page = report(tmp_path, make_run(tmp_path / "a", results=[result(1, 0.5)]))
    assert "<svg" not in page.section("Evaluation")


def test_many_tasks_of_ten_runs_stay_readable(tmp_path):
    """Every value has its cell, most of the curves are folded, and the eleventh colour has dashes."""
    runs = [
        make_run(
            tmp_path / f"r{i}",
            results=[result(1 + t // 33, (i + t) / 100, dataset=f"task{t % 33}") for t in range(40)],
        )
        for i in range(10)
    ]
    page: Page = report(tmp_path, *runs)
    assert [len(row) for row in page.main_table] == [11] * 35  # head and mean
    assert "2 more tasks over steps" in page.text
    assert "border-top:4px dashed #d55e00" in page.source
    assert page.source.count("<title>10 runs</title>") == 1


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("acc1", 0.1534, "15.3"),
        ("acc1", 1.0, "100.0"),
        ("acc1", None, DASH),
        ("r_mean", 0.75, "0.8"),  # ALBEF's are percent
        ("r_mean", 100.0, "100.0"),
        ("image_mean_rank", 1.0, "1"),
        ("image_mean_rank", 1234.56, "1,235"),
        ("modality_gap", 0.8123456, "0.8123"),
        ("count_region:3", 1, "1"),
        ("c", 0.5, "0.5"),
        ("adjusted_rand_index", -0.01, "-0.01"),
    ],
)
def test_numbers_are_written_by_their_kind(metric, value, expected):
    assert written(metric, value) == expected


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("acc1", [0.2, None, 0.7], 0.7),
        ("acc1", [0.2, None], None),
        ("text_mean_rank", [3.0, 2.0], 2.0),
        ("modality_gap", [0.9, 0.8], 0.8),
        ("image_avg_self_similarity", [0.9, 0.8], None),
        ("positive_pair_similarity", [0.9, 0.8], 0.9),
        ("toxicity_crime_avg", [0.9, 0.8], None),
        ("c", [1.0, 2.0], None),
        ("teacher_text_cka", [0.9, 0.8], 0.9),
    ],
)
def test_what_is_best(metric, values, expected):
    assert best(metric, values) == expected


def test_no_metric_of_an_evaluation_is_taken_for_a_share_that_is_none():
    """Names as the measures give them, of random features: whatever may leave 0..1 is written as it is."""
    images, texts = F.normalize(torch.randn(40, 8), dim=1), F.normalize(torch.randn(80, 8), dim=1)
    owner = torch.arange(80) // 2
    metrics = recall(images, texts, owner)
    metrics |= coco_keys(metrics, images, texts, owner) | feature_statistics(images, texts, owner)
    shares = {name: value for name, value in metrics.items() if is_share(name)}
    assert {"image_retrieval_recall@1", "mean_recall@1", "val/inbatch_top50"} <= set(shares)
    assert [name for name in metrics if "rank" in name or "gap" in name or name in PERCENT if name in shares] == []
    assert {name: value for name, value in shares.items() if not 0 <= value <= 1} == {}
