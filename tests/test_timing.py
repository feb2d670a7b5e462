"""Spans add up to the whole, inner ones are not counted twice, and none costs anything while no clock runs."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import arch

from kd_accel import timing
from kd_accel.config import TrainConfig
from kd_accel.schema import validate
from kd_accel.timing import OTHER, SPANS, Clock, span
from kd_accel.train import run

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """What the clock reads, in its only element."""
    reading = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: reading[0])
    return reading


def test_inner_spans_are_not_part_of_outer_ones(now):
    with Clock(CPU) as clock:
        now[0] += 1  # nobody's
        with span("backward"):
            now[0] += 2
            with span("student"):
                now[0] += 4
            now[0] += 8
        with span("student"):
            now[0] += 16
    assert clock.seconds() == {"student": 20, "backward": 10, OTHER: 1}


def test_an_exception_leaves_spans_and_clock_whole(now):
    clock = Clock(CPU)

    def fail() -> None:
        with clock, span("data"):
            now[0] += 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert clock.seconds() == {"data": 1, OTHER: 0}
    with Clock(CPU), span("data"):  # another one may run
        pass


def test_without_a_clock_nothing_is_counted(now):
    with span("data"):
        now[0] += 5
    with Clock(CPU) as clock:
        now[0] += 1
    assert clock.seconds() == {OTHER: 1}


def test_training_logs_where_a_step_went(tmp_path, train_shards, tiny_teacher):
    values = {
        "name": "run", "output_dir": str(tmp_path), "precision": "fp32",
        "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
        "student": {"arch": arch(), "projector": "linear"}, "teacher": {"path": str(tiny_teacher)},
        "objective": {"terms": {"feature": {"kind": "feature_mse"}}},
        "optim": {"lr": 1e-3, "steps": 3}, "log": {"every_steps": 2},
    }  # fmt: skip
    run(validate(TrainConfig, values))
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        split = {key.removeprefix("seconds/"): value for key, value in row.items() if key.startswith("seconds/")}
        assert split.keys() == {*SPANS, OTHER} - {"gather"}  # one process
        assert all(seconds > 0 for seconds in split.values())
    assert "seconds/" not in (tmp_path / "run/out.log").read_text()
