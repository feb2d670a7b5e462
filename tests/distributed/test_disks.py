"""Output that cannot be written, checkpoints that somebody removes: each costs a line, and no whole checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from distributed.test_faults import assert_same_run, errors_of, reached, start  # noqa: F401  the fixture among them
from distributed.test_resume import curve

from kd_accel import checkpoint

pytestmark = pytest.mark.distributed

STEPS = "optim.steps=12"


@pytest.fixture
def read_only(tmp_path):
    """A function that makes a folder read-only, for root too, and gives it back at the end."""
    mounted = []

    def mount(folder):
        if os.geteuid() or subprocess.run(["mount", "--bind", "-o", "ro", folder, folder]).returncode:
            pytest.skip("needs root, and the right to mount")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.root
@pytest.mark.slow
def test_read_only_output(start, read_only, tmp_path):  # noqa: F811
    """A new run and one that would go on: one line at the start, of one rank; the checkpoint stays."""
    assert start("run", "optim.steps=3").wait() == [0]
    read_only(tmp_path / "run")
    ranks = start("run", STEPS, "resume=auto", count=2)
    assert ranks.wait() == [2, 2], ranks.said()
    (line,) = errors_of(ranks)
    assert "Traceback" not in "".join(ranks.said())
    assert line.startswith("error: output_dir=")
    assert "cannot be written to ([Errno 30] Read-only file system" in line
    assert checkpoint.damage(checkpoint.newest(tmp_path / "run")) is None


@pytest.mark.slow
def test_checkpoints_removed_under_the_run(start, tmp_path):  # noqa: F811
    """The next one says so and is whole; the run is the one that nobody touched."""
    assert start("whole", STEPS).wait() == [0]
    ranks = start("run", STEPS)
    ranks.wait_until(reached(tmp_path / "run", 4))
    shutil.rmtree(tmp_path / "run" / "checkpoints", ignore_errors=True)
    assert ranks.wait() == [0], ranks.said()
    assert "checkpoints/step_00000003 is gone: it was removed under the run" in ranks.said()[0]
    assert checkpoint.damage(checkpoint.newest(tmp_path / "run")) is None
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_latest_names_nothing(start, tmp_path):  # noqa: F811
    """resume=auto says so and takes the highest step."""
    assert start("run", "optim.steps=3").wait() == [0]
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.write_text("step_00000009\n")
    ranks = start("run", "optim.steps=6", "resume=auto")
    assert ranks.wait() == [0], ranks.said()
    assert f"WARNING | {latest}: names no checkpoint; the highest step is taken" in ranks.said()[0]
    assert "resumed from " in ranks.said()[0]
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert latest.read_text() == "step_00000006\n"
