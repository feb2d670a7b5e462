"""A long run keeps its size: memory and open files of every process, from after the warm-up to the end.

KD_ACCEL_SOAK_STEPS=10000 python -m pytest -m slow tests/distributed/test_soak.py     # 2,000 steps without it
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from statistics import median

import pytest
from conftest import REPO
from distributed.test_resume import TWO, command, zero

from kd_accel.data.index import build_index, expand_shards

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = int(os.environ.get("KD_ACCEL_SOAK_STEPS", "2000"))
WARM_UP, WINDOW = 200, 200  # steps; a window holds two checkpoints
SAVE_EVERY = 100
GROWTH = 0.02  # of a process's resident memory
PAGE = os.sysconf("SC_PAGE_SIZE")
SECONDS = 0.3  # between two looks

Looks = dict[int, list[tuple[int, int, int]]]  # process id -> (step, resident bytes, open files) of each look


def descendants(pid: int) -> list[int]:
    """Processes that `pid` started, and those that they started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def look_at(pid: int) -> tuple[int, int] | None:
    """(resident bytes, open files) of a process; None when it has ended."""
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
        return resident, len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, json.JSONDecodeError):  # not there yet, or being written
        return 0


def watch(process: subprocess.Popen, run: Path) -> Looks:
    """Look at every descendant until the program ends."""
    looks: Looks = {}
    while process.poll() is None:
        step = steps_done(run)
        for pid in descendants(process.pid) if step else []:
            if (seen := look_at(pid)) is not None:
                looks.setdefault(pid, []).append((step, *seen))
        time.sleep(SECONDS)
    return looks


def medians(looks: list[tuple[int, int, int]], first: int, last: int) -> tuple[float, float]:
    """(resident bytes, open files) of one process, typical of the steps from `first` to `last`."""
    inside = [look for look in looks if first <= look[0] <= last]
    return median(look[1] for look in inside), median(look[2] for look in inside)


@pytest.mark.timeout(3600)
def test_memory_and_files_stay(data_root, tiny_teacher, tmp_path, capsys):
    """ZeRO-2, bf16, two ranks and their loader workers, every kind of loss memory, a checkpoint every 100 steps.

    Medians over 200 steps, so that a checkpoint's copies do not count: resident memory grows by less than 2 %, which is
    about 12 kB a step in 2,000 steps of a process of 1 GB, and the number of open files not at all.
    """
    shards = tmp_path / "pairs"
    shards.mkdir()
    for tar in (data_root / "pairs" / "train").glob("*.tar"):
        (shards / tar.name).symlink_to(tar)
    build_index(expand_shards(str(shards)))
    extra = [f"optim.steps={STEPS}", f"save.every_steps={SAVE_EVERY}", "log.every_steps=10", "precision=bf16"]
    words = command(TWO, tmp_path, shards, tiny_teacher, "soak", *extra)
    env = {**os.environ, **zero(2), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    start = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, cwd=REPO, env=env, stdout=log, stderr=log)
        looks = watch(process, tmp_path / "soak")
    seconds = time.monotonic() - start
    (tmp_path / "looks.json").write_text(json.dumps(looks))
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]

    whole = {pid: seen for pid, seen in looks.items() if seen[0][0] <= WARM_UP and seen[-1][0] > STEPS - WINDOW}
    assert len(whole) == 4, "two ranks, each with a worker, from the warm-up to the end"
    lines, failed = [f"{STEPS} steps in {seconds:.0f} s"], False
    for pid, seen in whole.items():
        memory, files = medians(seen, WARM_UP, WARM_UP + WINDOW)
        memory_at_end, files_at_end = medians(seen, STEPS - WINDOW, STEPS)
        growth = memory_at_end / memory - 1
        lines.append(
            f"process {pid}: {memory / 2**20:.1f} -> {memory_at_end / 2**20:.1f} MiB ({growth:+.2%}),"
            f" {files:g} -> {files_at_end:g} open files"
        )
        failed |= growth >= GROWTH or files_at_end > files
    with capsys.disabled():
        print("", *lines, sep="\n")
    assert not failed, "\n".join(lines)
