"""SLURM's numbers of a task as those of a rank."""

import os
import subprocess
import sys

import pytest

from kd_accel.schema import ConfigError
from kd_accel.slurm import adopt_tasks

TASK = {  # the second task of the second node, as srun 22.05 gives them
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "20007",
}


def adopted(**changes: str | None) -> dict[str, str]:
    """What is added to the environment of TASK with `changes`; None takes a variable away."""
    before = {name: value for name, value in (TASK | changes).items() if value is not None}
    after = dict(before)
    adopt_tasks(after)
    assert before.items() <= after.items()
    return {name: after[name] for name in after.keys() - before.keys()}


@pytest.mark.parametrize(("visible", "local"), [(None, "1"), ("", "1"), ("0,1", "1"), ("1", "0")])
def test_a_task_is_a_rank(visible, local):
    """Its GPU is the one of its number on the node, or the only one that SLURM lets it see."""
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": local}
    assert adopted(CUDA_VISIBLE_DEVICES=visible) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"WORLD_SIZE": "8"},  # a launcher runs inside of the task
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": None},  # the batch script itself, which has SLURM_NTASKS as well
    ],
)
def test_others_stay_as_they_are(changes):
    assert adopted(**changes) == {}


@pytest.mark.parametrize("missing", [["MASTER_ADDR"], ["MASTER_PORT"], ["MASTER_ADDR", "MASTER_PORT"]])
def test_tasks_that_cannot_meet_are_refused(missing):
    with pytest.raises(ConfigError, match=f"4 tasks, and {' and '.join(missing)} do not say where"):
        adopted(**dict.fromkeys(missing))


def test_the_program_adopts_its_task():
    """One line of error, from the first task alone."""
    for number, lines in (("0", 1), ("3", 0)):
        task = {name: value for name, value in TASK.items() if name != "MASTER_ADDR"} | {"SLURM_PROCID": number}
        words = [sys.executable, "-m", "kd_accel", "help"]
        result = subprocess.run(words, env={**os.environ, **task}, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr.count("error: srun started 4 tasks")) == (2, lines)
