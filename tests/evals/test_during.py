"""The section eval of training in one process: which rows there are, and that training goes on as without it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.config import TrainConfig
from kd_accel.eval_config import EvalConfig
from kd_accel.evals import during, evaluate, suite
from kd_accel.evals.results import RESULTS, read_results
from kd_accel.evals.tasks import TASKS
from kd_accel.schema import ConfigError, validate
from kd_accel.text_files import read_rows
from kd_accel.train import run

RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}  # with BatchNorm


@pytest.fixture
def sets(tmp_path, write_benchmark, labelled, captioned):
    """A folder of a zero-shot set of 7 images and a retrieval set of 6."""
    write_benchmark(tmp_path / "sets" / "things", labelled([0, 1, 2, 3, 4, 5, 0]), num_classes=6)
    return write_benchmark(tmp_path / "sets" / "pairs", captioned([1, 2, 1, 3, 1, 1])).parent


@pytest.fixture
def train(tmp_path, train_shards, tiny_teacher, sets):
    """A function that trains 6 steps of a student with BatchNorm, with checkpoints after 4 and 6."""

    def go(name: str, *, evaluate: dict | None = None, **changes):
        text, load = tiny.arch()["text_cfg"], {"batch_size": 4, "num_workers": 0}
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0, "augment": {"scale": [0.5, 1.0]}},
            "student": {"arch": {"embed_dim": 8, "vision_cfg": RESNET, "text_cfg": text}},
            "teacher": {"path": str(tiny_teacher)},
            "objective": {"terms": {"clip": {"kind": "clip"}, "kl": {"kind": "logit_kl"}}},
            "optim": {"lr": 1e-2, "steps": 6},
            "save": {"every_steps": 4},
            "log": {"every_steps": 1},
            "eval": None if evaluate is None else {**load, "data": str(sets), **evaluate},
        }
        run(validate(TrainConfig, values | changes))
        return tmp_path / "runs" / name

    return go


def results(folder) -> list[dict]:
    """The rows without their seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_results(folder / RESULTS)]


def curve(folder) -> list[dict]:
    """Rows of training, without what depends on the clock."""
    clock = ("samples_per_second", "data_wait", "seconds/")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def assert_same_training(ours, theirs) -> None:
    """The curve and every tensor of the last checkpoint, bit by bit."""
    assert curve(ours) == curve(theirs)
    mine, other = (checkpoint.newest(folder) / "state" for folder in (ours, theirs))
    for file in sorted(mine.glob("*.safetensors")):
        wanted = load_file(other / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(tensor.nan_to_num(), wanted[name].nan_to_num()), f"{file.name}: {name}"


def test_training_is_what_it_would_have_been(train):
    """Losses, weights, moments, running statistics, random states; rows by every_steps and at the end."""
    with_eval = train("with", evaluate={"every_steps": 4})
    assert_same_training(with_eval, train("without"))
    steps = [(row["step"], row["key"]) for row in results(with_eval)]
    assert steps == [(step, key) for step in (4, 6) for key in ("pairs", "things")]
    assert not (with_eval / ".evaluated").exists()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_rows_are_those_of_eval_on_the_checkpoint(train, sets, ema):
    """Of the moving average, where there is one; also in metrics.jsonl and in the table. A watcher that is started
    again does nothing twice."""
    folder = train("run", evaluate={"every_steps": 2}, train={"ema_decay": ema})
    model = shutil.copytree(folder, folder.parent / "copy" / "run")
    (model / RESULTS).unlink()
    watched = EvalConfig(model=str(model), data=str(sets), batch_size=4, num_workers=0, watch=True)
    assert suite.run(watched) == 0
    written = (model / RESULTS).read_text()
    assert suite.run(watched) == 0
    assert (model / RESULTS).read_text() == written
    assert results(folder)[2:] == results(model)
    logged = [row for row in read_rows(folder / "metrics.jsonl") if "loss" not in row]
    assert [row["step"] for row in logged] == [2, 2, 4, 4, 6, 6]
    things = results(folder)[1]
    assert logged[1] == {"step": 2} | {f"eval/things/{k}": v for k, v in things["metrics"].items() if v is not None}
    assert "things/acc1" in (folder / "evaluation_metrics_all.csv").read_text()


def test_missing_data_is_one_line_before_anything_is_built(train, tmp_path):
    with pytest.raises(ConfigError, match="^eval: data: .*nowhere: no such folder$"):
        train("run", evaluate={"data": str(tmp_path / "nowhere")}, teacher={"path": str(tmp_path / "no teacher")})
    assert not (tmp_path / "runs" / "run").exists()


def test_a_task_without_its_set_is_told_at_the_start(train, sets, write_benchmark, labelled, caplog):
    """The others are evaluated, under the names of their tasks."""
    write_benchmark(sets / "wds_vtab-dtd_test", labelled([0, 1, 2]), num_classes=6)
    with caplog.at_level(logging.WARNING):
        folder = train("run", evaluate={"tasks": ["vtab/dtd", "cifar10"]})
    assert [(row["key"], row["dataset"]) for row in results(folder)] == [("vtab/dtd", TASKS["vtab/dtd"].title)]
    said = [record.message for record in caplog.records if "skipped" in record.message]
    assert len(said) == 1
    assert said[0].startswith(f"eval: skipped cifar10: looked for {sets / 'wds_cifar10_test'}")
    assert "eval/vtab/dtd/acc1" in read_rows(folder / "metrics.jsonl")[-1]


def test_a_set_that_breaks_is_an_error_line(train, sets, write_benchmark, captioned, caplog):
    """The sets beside it have their rows, training goes on."""
    broken = {key: {**members, "png": b"junk"} for key, members in captioned([1, 1]).items()}
    write_benchmark(sets / "broken", broken)
    with caplog.at_level(logging.ERROR):
        folder = train("run", evaluate={"every_steps": 3})
    assert [(row["step"], row["key"]) for row in results(folder)] == [
        (s, k) for s in (3, 6) for k in ("pairs", "things")
    ]
    lines = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert [line.partition(" (")[0] for line in lines] == [
        f"evaluation of step {step}: {sets / 'broken'}: none of its 2 images is readable; the first: s0000: image"
        " cannot be decoded: none of JPEG, PNG, WEBP, GIF, BMP"
        for step in (3, 6)
    ]
    assert len(curve(folder)) == 6


def test_a_full_disk_costs_the_evaluation_alone(train, caplog, monkeypatch):
    """Where the student cannot be written, there are no rows, and training goes on."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(during, "write_release", full)
    with caplog.at_level(logging.ERROR):
        folder = train("run", evaluate={"every_steps": 3, "at_end": False})
    assert results(folder) == []
    assert "evaluation of step 3: [Errno 28] No space left on device" in caplog.text
    assert len(curve(folder)) == 6


def half(tower: str, embed_dim: int = 12) -> dict:
    """A student of one tower; the teacher is 12 wide."""
    student = {"arch": {"embed_dim": embed_dim, tower: tiny.arch()[tower]}}
    loss = {"kind": "embedding_l1"} if embed_dim == 12 else {"kind": "rkd"}
    return {"student": student, "objective": {"terms": {"term": loss}}}


def test_a_student_of_one_tower_is_refused(train):
    """Nothing to compare with: one line, at the start."""
    with pytest.raises(ConfigError, match=r"^eval: the student has no text tower.*set eval.text_from"):
        train("run", evaluate={}, **half("vision_cfg"))


@pytest.mark.parametrize(("tower", "other"), [("vision_cfg", "text_from"), ("text_cfg", "image_from")])
def test_one_tower_beside_its_teacher_s(train, sets, tmp_path, tower, other):
    """Rows while it trains are those of a watched run, which is the same run without them."""
    plain = train("plain", **half(tower))
    folder = train("run", evaluate={"every_steps": 2, other: "run"}, **half(tower))
    assert_same_training(folder, plain)
    load = {"data": str(sets), "batch_size": 4, "num_workers": 0, "watch": True, "output": str(tmp_path / "rows")}
    assert suite.run(EvalConfig(model=str(folder), **{other: "run"}, **load)) == 0
    watched = [{k: v for k, v in row.items() if k != "seconds"} for row in read_results(tmp_path / "rows")]
    assert [(row["step"], row["key"]) for row in watched] == [
        (step, key) for step in (4, 6) for key in ("pairs", "things")
    ]
    rows = results(folder)
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6]
    assert rows[2:] == watched
    assert "eval/things/acc1" in {name for row in read_rows(folder / "metrics.jsonl") for name in row}


def test_a_class_head_needs_no_texts(train, tmp_path, sets):
    """A student of labels alone has the row that `kd-accel eval` gives it."""
    for name in range(6):
        (tmp_path / "classes" / f"thing {name}").mkdir(parents=True)
        picture = tiny.picture((40 * name, 99, 200 - 30 * name), np.random.default_rng(name))
        (tmp_path / "classes" / f"thing {name}" / "0.jpg").write_bytes(picture)
    shutil.rmtree(sets / "pairs")
    folder = train(
        "run",
        evaluate={},
        teacher=None,
        data={"folder": str(tmp_path / "classes"), "label": "auto", "batch_size": 3, "num_workers": 0},
        student={"arch": {"embed_dim": 8, "vision_cfg": RESNET}, "num_classes": 6},
        objective={"terms": {"label": {"kind": "label_ce"}}},
        optim={"lr": 1e-2, "steps": 2},
    )
    (row,) = results(folder)
    assert (row["step"], row["task"], row["n"]) == (2, "class_head", 7)
    assert suite.run(EvalConfig(model=str(folder), data=str(sets), batch_size=4, num_workers=0)) == 0
    assert results(folder) == [row]  # known already


@pytest.mark.parametrize(
    ("student", "evaluate", "said"),
    [
        (half("vision_cfg"), {"text_from": "nowhere"}, r"^eval: text_from=nowhere: no such file"),
        (half("vision_cfg"), {"text_from": "run:b"}, r"^eval: text_from=run:b: .*give run:teacher$"),
        (half("vision_cfg", 8), {"text_from": "run"}, r"^eval: text_from=run: its text embeddings are 12 wide.* 8$"),
        (half("vision_cfg"), {"text_from": "run", "image_from": "run"}, r"they leave nothing of the model"),
        (half("vision_cfg"), {"image_from": "run"}, r"^eval: the student has no text tower"),
    ],
)
def test_a_tower_that_is_not_there_or_does_not_fit(train, tmp_path, student, evaluate, said):
    """One line before the first step, and no run."""
    with pytest.raises(ConfigError, match=said):
        train("run", evaluate=evaluate, **student)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.fixture
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("at", [3, 6])
def test_a_signal_in_the_middle_of_an_evaluation(train, monkeypatch, at):
    """After the set under way the run saves and stops, at a step that has its checkpoint and at one that has none; the
    resumed run evaluates the rest first, and no row is there twice."""
    whole = train("whole", evaluate={"every_steps": 1})
    measure = evaluate.measure

    def interrupted(on_set, what):
        if on_set.encoder.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(on_set, what)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    stopped = train("stopped", evaluate={"every_steps": 1})
    assert checkpoint.newest(stopped).name == f"step_{at:08d}"
    assert [row["key"] for row in results(stopped) if row["step"] == at] == ["pairs"]
    monkeypatch.setattr(evaluate, "measure", measure)
    train("stopped", evaluate={"every_steps": 1}, resume="auto")
    assert_same_training(stopped, whole)
    names = lambda rows: [row | {"model": None} for row in rows]  # noqa: E731
    assert names(results(stopped)) == names(results(whole))
    lines = (stopped / RESULTS).read_text().splitlines()
    assert len(lines) == len(results(whole))
    logged = [[row for row in read_rows(f / "metrics.jsonl") if "loss" not in row] for f in (stopped, whole)]
    assert logged[0] == logged[1]


@pytest.mark.usefixtures("_handlers")
def test_a_branch_that_is_stopped_at_once_has_a_checkpoint(train, monkeypatch):
    """In the evaluation of the step that it goes on from: resume=auto would start it anew without one."""
    trunk = train("trunk")
    measure = evaluate.measure
    monkeypatch.setattr(evaluate, "measure", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or measure(*given))
    start = trunk / "checkpoints" / "step_00000004"
    branch = train("branch", evaluate={"every_steps": 2}, resume=str(start))
    assert checkpoint.newest(branch).name == start.name
    assert [(row["step"], row["key"]) for row in results(branch)] == [(4, "pairs")]


def test_a_run_that_goes_on_from_before_an_evaluation_has_its_rows_once(train):
    """Killed after step 5, resumed from step 4: the same weights, so the row stays, and the curve has it again."""
    whole = train("whole", evaluate={"every_steps": 5, "at_end": False})
    killed = train("killed", evaluate={"every_steps": 5, "at_end": False})
    shutil.rmtree(killed / "checkpoints" / "step_00000006")
    train("killed", evaluate={"every_steps": 5, "at_end": False}, resume="auto")
    assert_same_training(killed, whole)
    assert len((killed / RESULTS).read_text().splitlines()) == len((whole / RESULTS).read_text().splitlines())
    logged = [[row for row in read_rows(f / "metrics.jsonl") if "loss" not in row] for f in (killed, whole)]
    assert logged[0] == logged[1]
    last = json.loads((checkpoint.newest(killed) / "state" / "progress.json").read_text())
    assert (last["step"], last["total_steps"]) == (6, 6)


def test_steps_and_epochs_are_counted_side_by_side(sets, tmp_path):
    """Of 12 steps in 4 epochs; the last one is not due as such."""

    def due(**when):
        values = {
            "name": "run",
            "data": {"shards": "anywhere", "batch_size": 8},
            "student": {"arch": tiny.arch()},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1e-2, "steps": 12},
            "eval": {"data": str(sets), "at_end": False, **when},
        }
        evaluation = during.TrainingEvaluation(validate(TrainConfig, values), tmp_path)
        return [step for step in range(13) if evaluation.is_due(step, steps_per_epoch=3, total_steps=12)]

    assert due(every_epochs=2) == [6, 12]
    assert due(every_epochs=2, every_steps=4) == [4, 6, 8, 12]


def test_rows_at_the_end_of_every_epoch(train):
    folder = train("run", evaluate={"every_epochs": 1, "at_end": False}, optim={"lr": 1e-2, "epochs": 2})
    whole = [row["step"] for row in curve(folder) if row["epoch"] in (1, 2)]
    assert len(whole) == 2
    assert [row["step"] for row in results(folder) if row["key"] == "things"] == whole


def test_a_section_without_a_time_is_refused(train):
    with pytest.raises(ConfigError, match="at_end=false leaves nothing to do"):
        train("run", evaluate={"at_end": False})
