"""Watching on two ranks: both evaluate the same checkpoints in the same order, and end together."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.distributed

WATCH = """
import os, shutil, signal, sys
from pathlib import Path
from evals.test_watch import Evaluations, publish
from kd_accel import distributed, processes
from kd_accel.evals.watch import watch
from kd_accel.schema import ConfigError

processes.start_process_group(60)
run, main = Path(sys.argv[1]), distributed.is_main()

def drop():
    if main:
        shutil.rmtree(run / "checkpoints" / "step_00000020")
    distributed.barrier()
    raise ConfigError("gone")

def stop():
    if not main:
        os.kill(os.getpid(), signal.SIGTERM)

if main:
    for step in (10, 20, 30):
        publish(run, step, total=40)
seen = Evaluations(at_10=distributed.barrier, at_20=drop, at_30=lambda: main and publish(run, 40, total=40))
watch(run, seen, interval_s=0.05)
assert seen.steps == [10, 20, 30, 40], seen.steps

again = Evaluations(at_10=stop)
watch(run, again, interval_s=0.05)
assert (again.steps, again.tasks) == ([10], 1), (again.steps, again.tasks)
print(f"rank {distributed.rank()} is done")  # one piece, also where Python does not buffer
processes.end_process(0)
"""


def test_ranks_see_the_same_checkpoints(tmp_path, run_ranks):
    """One of them is dropped meanwhile, one appears meanwhile; a signal to the last rank alone ends both."""
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    output = run_ranks([script, tmp_path / "run"])
    assert sorted(re.findall(r"rank \d is done", output)) == [
        "rank 0 is done",
        "rank 1 is done",
    ]
    assert output.count("step_00000020 was dropped before it was evaluated") == 1
    assert output.count("stopped by a signal to another rank") == 1
