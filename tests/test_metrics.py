"""Numbers of a run: each step once, valid JSON, visible on the console, and sent to trackers by name."""

from __future__ import annotations

import json
import logging
import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from kd_accel.config import TrainConfig
from kd_accel.metrics import MetricsLog, Throughput, drop_rows_after
from kd_accel.schema import ConfigError, validate
from kd_accel.text_files import read_rows


def config(*trackers: str) -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "run",
            "data": {"shards": "shards", "batch_size": 8},
            "student": {"arch": "ViT-B-32"},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1e-3, "steps": 10},
            "log": {"trackers": list(trackers)},
        },
    )


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write(run_dir, steps, *, start_step=0):
    metrics = MetricsLog(run_dir, config(), total_steps=10, start_step=start_step)
    for step in steps:
        metrics.log({"step": step, "loss": 1.0 / step, "samples_per_second": 100.0})
    metrics.close()


def test_a_resumed_run_has_every_step_once(tmp_path):
    """Rows beyond the step resumed from are dropped, so the file reads as if nothing had been interrupted."""
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "resumed", range(1, 7))
    write(tmp_path / "resumed", range(5, 9), start_step=4)
    rows = read_rows(tmp_path / "resumed" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows == read_rows(tmp_path / "whole" / "metrics.jsonl")


def test_a_torn_last_line_is_left_out(tmp_path):
    """A run killed in the middle of a write can be resumed: the torn line is no row, and it does not stay."""
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    drop_rows_after(path, 2)
    assert path.read_text() == whole


def test_numbers_that_json_lacks_become_null(tmp_path):
    """A file with an infinite gradient norm is still JSON for every reader."""
    metrics = MetricsLog(tmp_path, config(), total_steps=1)
    metrics.log({"step": 1, "grad_norm": float("inf"), "loss": float("nan")})
    metrics.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "grad_norm": None, "loss": None}


def test_rows_are_on_disk_before_the_run_ends(tmp_path):
    """A killed run keeps what it logged."""
    metrics = MetricsLog(tmp_path, config(), total_steps=2)
    metrics.log({"step": 1, "loss": 2.0})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    metrics.close()


def test_without_a_terminal_a_row_is_one_log_line(tmp_path, capsys):
    """Console and out.log show step, loss, throughput and waiting share in words; both in the one format."""
    metrics = MetricsLog(tmp_path, config(), total_steps=10)
    metrics.log({"step": 3, "loss": 0.5, "samples_per_second": 812.4, "data_wait": 0.25})
    metrics.close()
    shown = capsys.readouterr().err
    assert shown.rstrip().endswith("| INFO | step 3/10 | loss 0.5 | 812 samples/s | waiting for data 25%")
    assert (tmp_path / "out.log").read_text() == shown


def test_on_a_terminal_a_bar_replaces_the_lines(tmp_path, monkeypatch):
    """On a terminal rows move the bar and carry loss and lr; out.log still has the line."""
    import io
    import sys

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    metrics = MetricsLog(tmp_path, config(), total_steps=10, start_step=4)
    metrics.log({"step": 6, "loss": 0.5, "lr": 1e-3})
    metrics.close()
    assert "6/10" in screen.getvalue()
    assert "loss=0.5" in screen.getvalue()
    assert "| INFO |" not in screen.getvalue()
    assert "step 6/10" in (tmp_path / "out.log").read_text()


def test_close_gives_the_logger_back(tmp_path):
    """Two runs in one process do not write into each other's out.log."""
    before = list(logging.getLogger("kd_accel").handlers)
    write(tmp_path / "first", [1])
    first = (tmp_path / "first" / "out.log").read_text()
    write(tmp_path / "second", [2])
    assert (tmp_path / "first" / "out.log").read_text() == first
    assert logging.getLogger("kd_accel").handlers == before


def test_tensorboard_gets_every_number(tmp_path, accelerator):
    """Scalars arrive under their names and steps in RUN/tensorboard."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = MetricsLog(tmp_path, config("tensorboard"), accelerator=accelerator, total_steps=10)
    metrics.log({"step": 5, "loss": 0.5, "loss/clip": 0.25})
    metrics.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, value in {"loss": 0.5, "loss/clip": 0.25}.items():
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(5, value)]


def test_an_unknown_tracker_is_the_users_mistake(tmp_path, accelerator):
    """The message lists the names that Accelerate knows; nothing is written."""
    with pytest.raises(ConfigError, match="unknown tracker 'tensorbord'; Accelerate knows .*tensorboard, .*wandb"):
        MetricsLog(tmp_path / "run", config("tensorbord"), accelerator=accelerator, total_steps=1)
    assert not (tmp_path / "run").exists()


def test_a_missing_tracker_package_names_the_install_command(tmp_path, accelerator):
    """Accelerate would drop the tracker without a word; we stop."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    missing = sorted(set(LOGGER_TYPE_TO_CLASS) - {str(name) for name in get_available_trackers()})
    if not missing:
        pytest.skip("every tracker of Accelerate is installed here")
    with pytest.raises(ConfigError, match=f"'{missing[0]}' is not installed: pip install"):
        MetricsLog(tmp_path, config(missing[0]), accelerator=accelerator, total_steps=1)


def test_throughput_counts_since_the_last_row():
    """Samples over elapsed time and waiting over elapsed time; taking a row starts anew."""
    rate = Throughput()
    started = time.perf_counter()
    rate.add(64)
    with rate.waiting():
        time.sleep(0.05)
    time.sleep(0.05)
    row = rate.take()
    elapsed = time.perf_counter() - started
    assert row["samples_per_second"] == pytest.approx(64 / elapsed, rel=0.05)
    assert 0.05 / elapsed <= row["data_wait"] < 1
    assert rate.take() == {"samples_per_second": 0.0, "data_wait": 0.0}
