"""Watch mode: each whole checkpoint once, in order; runs that do not exist yet, dropped or broken checkpoints, ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_accel.evals.watch import watch
from kd_accel.schema import ConfigError

pytestmark = pytest.mark.usefixtures("own_handlers")


def publish(run: Path, step: int, *, total: int = 0, content: str = "a") -> Path:
    """What the watcher looks at of a checkpoint: its name, files.json, and where the run stands."""
    folder = run / "checkpoints" / f".partial_step_{step:08d}"
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "progress.json").write_text(json.dumps({"step": step, "total_steps": total}))
    (folder / "files.json").write_text(content)
    target = folder.with_name(f"step_{step:08d}")
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)


class Evaluations:
    """Notes steps; `then` has what happens while one of them is evaluated, between its two tasks."""

    def __init__(self, **then):
        self.steps: list[int] = []
        self.tasks = 0
        self._then = {int(step.removeprefix("at_")): action for step, action in then.items()}

    def __call__(self, checkpoint: Path) -> Iterator[dict]:
        step = int(checkpoint.name.removeprefix("step_"))
        self.steps.append(step)
        yield {}
        self.tasks += 1
        self._then.pop(step, lambda: None)()
        yield {}
        self.tasks += 1


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def test_oldest_first_until_the_last_step(run):
    """Those that appear meanwhile too; the run's end is in its last checkpoint."""
    publish(run, 20, total=40)
    publish(run, 10, total=40)
    seen = Evaluations(at_10=lambda: publish(run, 30, total=40), at_30=lambda: publish(run, 40, total=40))
    watch(run, seen, interval_s=0.01)
    assert seen.steps == [10, 20, 30, 40]
    assert seen.tasks == 8


def test_a_run_that_does_not_exist_yet_is_waited_for(run, capsys):
    """One line for the whole time of waiting."""
    later = threading.Timer(0.5, publish, [run, 5], {"total": 5})
    later.start()
    seen = Evaluations()
    watch(run, seen, interval_s=0.01)
    later.join()
    assert seen.steps == [5]
    assert capsys.readouterr().out.count("\n") == 1


def test_half_written_checkpoints_are_no_checkpoints(run):
    """A temporary name, and a directory without files.json."""
    (run / "checkpoints" / ".partial_step_00000010").mkdir(parents=True)
    (run / "checkpoints" / "step_00000020").mkdir()
    publish(run, 30, total=30)
    seen = Evaluations()
    watch(run, seen, interval_s=0.01)
    assert seen.steps == [30]


@pytest.mark.parametrize(("until", "expected"), [(20, [10, 20]), (25, [10, 20]), (10, [10])])
def test_until_step(run, until, expected):
    """Later checkpoints are left alone, and one of them tells that no earlier one is to come."""
    for step in (10, 20, 30):
        publish(run, step, total=99)
    seen = Evaluations()
    watch(run, seen, interval_s=0.01, until_step=until)
    assert seen.steps == expected


def test_a_step_that_is_written_anew_is_evaluated_anew(run):
    """The run was resumed from before it, and has other weights there."""
    publish(run, 10, total=20)
    again = lambda: (publish(run, 10, total=20, content="b"), publish(run, 20, total=20))  # noqa: E731
    seen = Evaluations(at_10=again)
    watch(run, seen, interval_s=0.01)
    assert seen.steps == [10, 10, 20]


def drop(run: Path, step: int, error: str = "no such file") -> None:
    shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    raise ConfigError(error)


def test_a_checkpoint_that_is_dropped_is_said(run, capsys):
    """save.keep_last was faster: no error, and the watch goes on."""
    publish(run, 10)
    publish(run, 20, total=20)
    seen = Evaluations(at_10=lambda: drop(run, 10))
    watch(run, seen, interval_s=0.01)
    assert seen.steps == [10, 20]
    assert "step_00000010 was dropped before it was evaluated" in capsys.readouterr().out


def refuse() -> None:
    raise ConfigError("not finite")


def test_a_broken_checkpoint_stops_no_other(run, capsys):
    """It is said at once, and is the error at the end."""
    publish(run, 10)
    publish(run, 20, total=20)
    seen = Evaluations(at_10=refuse)
    with pytest.raises(ConfigError, match="^[^\n]*step_00000010: not finite$"):
        watch(run, seen, interval_s=0.01)
    assert seen.steps == [10, 20]
    assert "error: " in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_between_two_tasks(run, number, capsys):
    """The task under way is finished, the next one is not begun, nothing is raised."""
    publish(run, 10)
    publish(run, 20, total=20)
    seen = Evaluations(at_10=lambda: os.kill(os.getpid(), number))
    watch(run, seen, interval_s=0.01)
    assert (seen.steps, seen.tasks) == ([10], 1)
    assert f"stopped by {number.name}" in capsys.readouterr().out


def test_a_signal_ends_the_waiting(run):
    """At once, however long the interval is."""
    later = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM])
    later.start()
    watch(run, Evaluations(), interval_s=600)
    later.join()


def test_one_model_is_nothing_to_watch(run):
    (publish(run, 10) / "student").mkdir()
    (run / "open_clip_config.json").write_text("{}")
    for path in (run, run / "checkpoints" / "step_00000010"):
        with pytest.raises(ConfigError, match="watch=true: .* is one model"):
            watch(path, Evaluations(), interval_s=0.01)
