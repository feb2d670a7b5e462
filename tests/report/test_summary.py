"""Every run has a card that says what it is, what it cost and what came of it."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from report_run import make_run, report, result
from safetensors.torch import save_file

pytest.importorskip("matplotlib", reason="the report needs the extra 'report'")


def card(page, name: str) -> str:
    """The text of a run's card."""
    cards = re.findall(r"<article><h2>.*?</article>", page.source, flags=re.DOTALL)
    found = next(text for text in cards if f"</i>{name}</h2>" in text)
    return re.sub(r"<[^>]*>", " ", found).replace("&#x27;", "'").strip()


def test_a_student_its_teacher_and_its_baseline(tmp_path):
    teacher = make_run(tmp_path / "big", results=[result(4, 0.5), result(4, 0.7, dataset="x")])
    results = [result(4, 0.25), result(4, 0.5, dataset="x")]
    student = make_run(tmp_path / "kd", results=results, teacher=teacher)
    page = report(tmp_path, teacher, student, make_run(tmp_path / "alone", results=[]))
    assert "Teacher of kd" in card(page, "big")
    assert "Student of big" in card(page, "kd")
    assert "Trained without a teacher" in card(page, "alone")
    assert "mean of" not in card(page, "alone")
    assert "60.0 %  mean of 2 tasks" in card(page, "big")
    assert "37.5 %  mean of 2 tasks, 62 % of its teacher's" in card(page, "kd")  # (25 + 50) / (50 + 70)


def test_many_students_are_counted(tmp_path):
    teacher = make_run(tmp_path / "big")
    students = [make_run(tmp_path / f"s{i}", teacher=teacher) for i in range(4)]
    assert "Teacher of s0 and s1 and s2" in card(report(tmp_path, teacher, *students[:3]), "big")
    assert "Teacher of 4 others" in card(report(tmp_path, teacher, *students), "big")


def test_losses_are_named_with_their_weights(tmp_path):
    terms = {"a": {"kind": "clip", "weight": 1.0}, "b": {"kind": "feature_mse", "weight": 2000.0}}
    terms["c"] = {"kind": "logit_kl", "weight": {"kind": "linear"}}
    folder = make_run(tmp_path / "kd")
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"objective": {"terms": terms}}
    teachers = {"l": {"arch": "ViT-L-14", "pretrained": "openai"}, "s": {"path": "runs/small"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"teachers": teachers}))
    text = card(report(tmp_path, folder), "kd")
    assert "Student of ViT-L-14 (openai) and runs/small." in text
    assert "Loss: clip, 2000 feature_mse, scheduled logit_kl." in text


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((1,), "1 step, 64 samples in 2 s of training: 32 samples/s on 2 processes."),
        ((10, 100), "100 steps, 6,400 samples in 3 min 20 s of training: 32 samples/s on 2 processes."),
        ((9_000,), "9,000 steps, 576,000 samples in 5 h 0 min of training: 32 samples/s on 2 processes."),
    ],
)
def test_what_it_cost(steps, expected, tmp_path):
    """64 samples per step at 32 per second: two seconds a step."""
    assert expected in card(report(tmp_path, make_run(tmp_path / "a", steps=steps)), "a")


def test_the_time_of_every_stretch_counts(tmp_path):
    """100 samples at 10 per second and 100 at 50 are 12 seconds, not 200 at their mean of 30."""
    folder = make_run(tmp_path / "a")
    rows = (
        '{"step": 1, "samples": 100, "samples_per_second": 10}',
        '{"step": 2, "samples": 200, "samples_per_second": 50}',
    )
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert "200 samples in 12 s" in card(report(tmp_path, folder), "a")


def test_the_size_of_the_student_is_that_of_its_newest_checkpoint(tmp_path):
    folder = make_run(tmp_path / "a")
    state = folder / "checkpoints/step_00000003/state"
    state.mkdir(parents=True)
    (state / "progress.json").write_text("{}")
    (state.parent / "student").mkdir()
    weights = {"w": torch.zeros(1000, 2000), "logit_scale": torch.tensor(1.0)}
    save_file(weights, state.parent / "student/open_clip_model.safetensors")
    assert "2.0 M parameters" in card(report(tmp_path, folder), "a")
