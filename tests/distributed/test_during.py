"""Evaluation in the middle of training on two ranks: training and its rows, bit by bit, whatever the engine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_process
from distributed.test_eval import write_set
from distributed.test_faults import Ranks, state_of
from distributed.test_resume import SHARDED, TWO, command, curve, zero

pytestmark = pytest.mark.distributed

STEPS = "optim={lr: 0.01, steps: 6, warmup_steps: 2}"
SAVES = "save.every_steps=4"  # between two evaluations nothing is made alike on all ranks
RESNET = "student.arch.vision_cfg={image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 16}"
LAUNCHES = {
    "DDP, BatchNorm": ({}, [RESNET]),
    "ZeRO-2, bf16, moving average": (zero(2), [SHARDED, "precision=bf16", "train.ema_decay=0.5"]),
    "ZeRO-3": (zero(3), []),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Three batches of four, and one: ranks have different numbers of them."""
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder / "classes", [i % 6 for i in range(11)])
    write_set(folder / "one_image", ["a picture\nof nothing"])
    return folder


def rows_of(file: Path) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def training_of(folder: Path) -> list[dict]:
    return [row for row in curve(folder) if "loss" in row]


@pytest.mark.parametrize(
    "launch", [pytest.param(name, marks=[] if name.startswith("ZeRO-2") else pytest.mark.slow) for name in LAUNCHES]
)
def test_training_and_rows_are_what_they_would_have_been(launch, tmp_path, train_shards, tiny_teacher, sets):
    """Losses, weights, moments, memory and random states of the run without evaluation; the rows that one process,
    watching, finds in its checkpoints."""
    env, extra = LAUNCHES[launch]
    words = lambda name: command(TWO, tmp_path, train_shards, tiny_teacher, name, STEPS, SAVES, *extra)  # noqa: E731
    load = ["batch_size=4", "num_workers=1"]
    run_process(words("plain"), env=env)
    run_process([*words("run"), f"eval={{data: {sets}, every_steps: 2}}", *(f"eval.{key}" for key in load)], env=env)
    plain, run = tmp_path / "plain", tmp_path / "run"
    assert training_of(run) == training_of(plain)
    ours, theirs = state_of(run), state_of(plain)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours[file][name].nan_to_num(), tensor.nan_to_num()), f"{file}: {name}"
    watched = ["-m", "kd_accel", "eval", str(run), "watch=true", f"output={tmp_path / 'rows'}", f"data={sets}", *load]
    output = run_process([sys.executable, *watched])
    assert "waiting" not in output  # the last checkpoint says that it is the last
    assert [(row["step"], row["key"], row["n"]) for row in rows_of(tmp_path / "rows")] == [
        (step, *row) for step in (4, 6) for row in (("classes", 11), ("one_image", 1))
    ]
    rows = rows_of(run / "results.jsonl")
    assert [row["step"] for row in rows] == [2, 2, 4, 4, 6, 6]
    assert rows_of(tmp_path / "rows") == rows[2:]


def test_sigterm_to_everyone_during_an_evaluation(tmp_path, train_shards, tiny_teacher, free_port):
    """Ranks and their loaders' workers get it, as from SLURM: the set under way is finished, all ranks save the step
    and end with 0; resumed, the run evaluates the rest before it goes on."""
    sets, run = tmp_path / "sets", tmp_path / "run"
    for number in range(10):
        write_set(sets / f"set{number:02d}", [0, 1, 2])
    evaluation = f"eval={{data: {sets}, every_steps: 5, batch_size: 1, num_workers: 1}}"
    words = command([sys.executable], tmp_path, train_shards, tiny_teacher, "run", STEPS, SAVES, evaluation)
    said = tmp_path / "said"
    with Ranks(words, said, count=2, port=free_port, start_new_session=True) as ranks:
        ranks.wait_until(lambda: (run / "results.jsonl").exists() and (run / "results.jsonl").stat().st_size > 0)
        for process in ranks.processes:
            os.killpg(process.pid, signal.SIGTERM)
        assert ranks.wait() == [0, 0], ranks.said()
        assert re.search(r"stopped by .* after step 5; resume=auto goes on", ranks.said()[0])
    assert {row["step"] for row in rows_of(run / "results.jsonl")} == {5}
    assert 0 < len(rows_of(run / "results.jsonl")) < 10
    with Ranks([*words, "resume=auto"], said, count=2, port=free_port, env=zero(2)) as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    keys = [(row["step"], row["key"]) for row in rows_of(run / "results.jsonl")]
    assert keys == [(step, f"set{number:02d}") for step in (5, 6) for number in range(10)]
