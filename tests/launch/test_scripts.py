"""launch/torchrun.sh and launch/node.sh, run as they are: a killed process, a SIGTERM, the same run in the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import REPO, kill_tree, run_process
from distributed.test_faults import assert_same_run, reached
from distributed.test_resume import SHARDED, TWO, command, zero

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

LONG = ["optim={lr: 0.01, steps: 100, warmup_steps: 2}", SHARDED, "save.every_steps=20"]


@pytest.fixture(scope="module")
def words(train_shards, tiny_teacher) -> Callable[..., list[str]]:
    return lambda folder, name: command([], folder, train_shards, tiny_teacher, name, *LONG)[3:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_shards, tiny_teacher) -> Path:
    """The run of two ZeRO-2 processes that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    run_process(command(TWO, folder, train_shards, tiny_teacher, "whole", *LONG), env=zero(2))
    return folder / "whole"


@contextmanager
def started(script: str, words: list[str], log: Path, **env: str) -> Iterator[subprocess.Popen]:
    """bash launch/SCRIPT with `words`; nothing of it is left behind."""
    place = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PROCESSES": "2",
    }
    with log.open("a") as file:
        line = ["bash", f"launch/{script}", *words]
        process = subprocess.Popen(line, cwd=REPO, env={**os.environ, **place, **env}, stdout=file, stderr=file)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
        process.wait()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that train, without their launcher."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "kd_accel" in child.cmdline() and "RANK" in child.environ()]


def test_torchrun_starts_dead_processes_again(words, whole, tmp_path):
    """kill -9 to one of two: both start again from the checkpoint of step 20 and end as if nothing had been."""
    run, log = tmp_path / "killed", tmp_path / "log"
    with started("torchrun.sh", words(tmp_path, "killed"), log) as process:
        wait_for(reached(run, 25), process, log)
        ranks(process)[-1].kill()
        assert process.wait(500) == 0, log.read_text()
    assert log.read_text().count("resumed from") == 1
    assert_same_run(run, whole)


def test_a_node_asks_to_be_started_again(words, whole, tmp_path, free_port):
    """SIGTERM, as a container gets it: the run is saved and the exit code is 143; the next start ends it with 0."""
    run, log = tmp_path / "evicted", tmp_path / "log"
    node = {"NODES": "1", "NODE_RANK": "0", "HEAD": "127.0.0.1", "PORT": str(free_port)}
    with started("node.sh", words(tmp_path, "evicted"), log, **node) as process:
        wait_for(reached(run, 5), process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(500) == 143, log.read_text()
    assert (run / "stopped").read_text().startswith("SIGTERM after step")
    with started("node.sh", words(tmp_path, "evicted"), log, **node) as process:
        assert process.wait(500) == 0, log.read_text()
    assert not (run / "stopped").exists()
    assert_same_run(run, whole)


def test_a_node_passes_a_mistake_on(words, tmp_path):
    """One line, 2, and nothing is launched."""
    with started("node.sh", [*words(tmp_path, "mistake"), "optim.lrr=1"], tmp_path / "log") as process:
        assert process.wait(500) == 2
    assert (tmp_path / "log").read_text().count("error: ") == 1
