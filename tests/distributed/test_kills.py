"""A run that is killed again and again is the run that never was.

KD_ACCEL_KILLS=100 python -m pytest -m slow tests/distributed/test_kills.py
20 without it; half of them on two ranks.
"""

from __future__ import annotations

import os
import random
import time

import pytest
from distributed.test_faults import assert_same_run, reached, start  # noqa: F401  the fixture among them
from distributed.test_resume import SHARDED, curve, zero

KILLS = int(os.environ.get("KD_ACCEL_KILLS", "20"))

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300 + 60 * KILLS)]


@pytest.mark.parametrize("count", [1, 2])
def test_killed_again_and_again(start, tmp_path, count, capsys):  # noqa: F811
    """SIGKILL at random moments, half of them while files are written, by turns in the foreground and behind it."""
    options = {"count": count, "env": zero(2) if count == 2 else {}}
    steps = [f"optim.steps={10 * KILLS}", "save.every_steps=3", *([SHARDED] if count == 2 else [])]
    assert start("whole", *steps, **options).wait(600) == [0] * count
    run, inside = tmp_path / "killed", 0
    for kill in range(KILLS // 2):
        background = f"save.background={str(bool(kill % 2)).lower()}"
        ranks = start("killed", "resume=auto", *steps, background, **options)
        done = len(curve(run)) if kill else 0
        ranks.wait_until(reached(run, done + random.randint(1, 6)))
        if kill % 4 < 2:
            ranks.wait_until(lambda: any((run / "checkpoints").glob(".partial_*")))
        else:
            time.sleep(random.random() / 10)
        ranks.kill()
        inside += any((run / "checkpoints").glob(".partial_*"))
    assert start("killed", "resume=auto", *steps, **options).wait(600) == [0] * count
    assert_same_run(run, tmp_path / "whole")
    assert inside >= KILLS // 10
    with capsys.disabled():
        print(f"\n{KILLS // 2} kills on {count} ranks, {inside} of them inside a checkpoint: bit-identical")
