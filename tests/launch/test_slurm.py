"""launch/slurm.sbatch as it is, under a real SLURM of two nodes: stopped, requeued, resumed, and the same run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPO, run_process
from distributed.test_faults import assert_same_run, reached
from distributed.test_resume import SHARDED, command

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]

STEPS = 150
LONG = f"optim={{lr: 0.01, steps: {STEPS}, warmup_steps: 2}}"
ACCELERATE = [sys.executable, "-c", "from accelerate.commands.accelerate_cli import main; main()", "launch"]


def arguments(shards: Path, teacher: Path) -> list[str]:
    """What stands behind `train`: a tiny student; name and output_dir come from the script."""
    words = command([], Path(), shards, teacher, "unnamed", LONG, SHARDED, "save.every_steps=1000")
    return [word for word in words[3:] if not word.startswith(("name=", "output_dir="))]


def submit(slurm: Callable, name: str, folder: Path, words: list[str], *options: str, **env: str) -> str:
    """The job's number; its output is FOLDER/NAME.out."""
    place = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",  # n1 is no name that this machine knows
        "OUTPUT_DIR": str(folder),
    }
    out = ["--parsable", f"--job-name={name}", f"--chdir={REPO}", f"--output={folder}/{name}.out"]
    return slurm("sbatch", *out, *options, "launch/slurm.sbatch", *words, env=place | env).strip()


def field(slurm: Callable, job: str, name: str) -> str:
    """One of what `scontrol show job` tells."""
    told = dict(part.split("=", 1) for part in slurm("scontrol", "show", "job", job).split() if "=" in part)
    return told[name]


def wait_for(happened: Callable[[], bool], out: Path, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"that does not happen\n{out.read_text() if out.exists() else ''}"
        time.sleep(0.2)


def test_a_job_is_stopped_requeued_resumed_and_finishes(slurm, tmp_path, train_shards, tiny_teacher):
    """ZeRO-2 on two nodes; SIGUSR1 as SLURM sends it before the time limit. The weights are those of the run on one
    machine that nobody stopped, to the bit."""
    words = arguments(train_shards, tiny_teacher)
    run, out = tmp_path / "student", tmp_path / "student.out"
    job = submit(slurm, "student", tmp_path, words, "--gpus-per-node=1")
    wait_for(reached(run, 5), out)
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for((run / "stopped").exists, out)
    assert int((run / "stopped").read_text().split()[-1]) < STEPS

    whole = [*words, f"output_dir={tmp_path}", "name=whole"]
    # The job waits in the queue meanwhile.
    run_process([*ACCELERATE, "--config_file", "launch/zero2.yaml", "-m", "kd_accel", "train", *whole])
    wait_for(lambda: field(slurm, job, "JobState") == "COMPLETED", out)
    said = out.read_text()
    assert (field(slurm, job, "Restarts"), field(slurm, job, "NodeList")) == ("1", "n[1-2]")
    assert said.count("stopped by SIGUSR1") == said.count("resumed from") == 1, said
    assert not (run / "stopped").exists()
    assert_same_run(run, tmp_path / "whole")


def test_slurm_starts_every_process_itself(slurm, tmp_path, train_shards, tiny_teacher):
    """Two tasks on one node, without accelerate launch: one run of two ranks, in ZeRO-1."""
    words = [*arguments(train_shards, tiny_teacher), "optim.steps=3"]
    engine = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    tasks = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2"]
    job, out = submit(slurm, "tasks", tmp_path, words, *tasks, **engine), tmp_path / "tasks.out"
    wait_for(lambda: field(slurm, job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), out)
    said = out.read_text()
    assert field(slurm, job, "JobState") == "COMPLETED", said
    assert said.count("ZeRO-1, fp32") == 1, said
    assert "4 per process x 2 processes = 8 samples per step" in said


def test_a_mistake_ends_the_job(slurm, tmp_path):
    """It fails with one line, and does not come back."""
    job, out = submit(slurm, "mistake", tmp_path, ["optim.lrr=1"], "--gpus-per-node=1"), tmp_path / "mistake.out"
    wait_for(lambda: field(slurm, job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), out)
    assert (field(slurm, job, "JobState"), field(slurm, job, "Restarts")) == ("FAILED", "0")
    said = [line for line in out.read_text().splitlines() if line.startswith("error: optim.lrr: unknown key")]
    assert len(said) == 1  # by the job; a launcher repeats it, indented
