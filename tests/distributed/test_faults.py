"""What a run survives: signals, dead and hanging ranks, nan, a full disk; and what it says.

Ranks are started by hand, as SLURM does: no launcher ends the others when one of them dies.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import warm_python
from conftest import REPO, kill_tree, run_process
from distributed import fault_worker
from distributed.test_resume import SHARDED, TWO, command, curve, zero
from marks import slow_but
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.train import STOPPED

pytestmark = pytest.mark.distributed

STEPS = 40
LONG = f"optim={{lr: 0.01, steps: {STEPS}, warmup_steps: 2}}"
MODULE = ["-m", "kd_accel", "train"]


class Ranks:
    """The processes of one run, each with a log of its own."""

    def __init__(self, words: list[str], folder: Path, *, count: int, port: int, env: dict | None = None, **popen):
        common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
        common |= {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if count > 1 else {}
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            environment = {**os.environ, **{k: str(v) for k, v in (common | own | (env or {})).items()}}
            with log.open("w") as file:
                self.processes.append(
                    warm_python.Popen(words, cwd=REPO, env=environment, stdout=file, stderr=file, **popen)
                )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                kill_tree(process.pid)
            process.wait()

    def wait(self, timeout: float = 300) -> list[int]:
        return [process.wait(timeout) for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def wait_until(self, happened: Callable[[], bool], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not happened():
            ended = [process.poll() for process in self.processes]
            assert None in ended, f"the run ended with {ended} before that\n" + "\n".join(self.said())
            assert time.monotonic() < deadline, "that does not happen"
            time.sleep(0.005)


def reached(run: Path, step: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step


def state_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor of the newest checkpoint: weights, moments, objective, memory, random states."""
    return {file.name: load_file(file) for file in sorted((checkpoint.newest(run) / "state").glob("*.safetensors"))}


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same curve and the same bits."""
    assert curve(ours) == curve(theirs)
    mine, other = state_of(ours), state_of(theirs)
    assert mine.keys() == other.keys()
    for file, tensors in mine.items():
        assert tensors.keys() == other[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor.nan_to_num(), other[file][name].nan_to_num()), f"{file}: {name}"


def errors_of(ranks: Ranks) -> list[str]:
    return [line for said in ranks.said() for line in said.splitlines() if line.startswith("error:")]


@pytest.fixture
def start(tmp_path, train_shards, tiny_teacher, free_port):
    """A function that starts ranks on the run `name`; those still alive are killed at the end."""
    started = []

    def begin(name: str, *extra: str, count: int = 1, program: list[str] | None = None, **options) -> Ranks:
        words = command([sys.executable], tmp_path, train_shards, tiny_teacher, name, LONG, *extra)
        if program is not None:
            words = [sys.executable, *program, *words[words.index("train") :]]
        ranks = Ranks(words, tmp_path / f"log_{name}_{len(started)}", count=count, port=free_port, **options)
        started.append(ranks)
        return ranks

    yield begin
    for ranks in started:
        ranks.kill()


SELDOM = "save.every_steps=20"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_shards, tiny_teacher):
    """The run of two ranks that no signal stops."""
    folder = tmp_path_factory.mktemp("whole")
    run_process(command(TWO, folder, train_shards, tiny_teacher, "whole", LONG, SHARDED, SELDOM), env=zero(2))
    return folder / "whole"


@pytest.mark.parametrize(
    ("number", "background"),
    slow_but([(signal.SIGUSR1, True)], [(signal.SIGTERM, False), (signal.SIGUSR1, True)]),
    ids=lambda value: str(value),
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(start, whole, tmp_path, number, background):
    """ZeRO-2 on two, the second rank gets it thrice, then both until they end: both save that step and exit 0; the rest
    is the same run."""
    options = {"count": 2, "env": zero(2)}
    extra = [SHARDED, SELDOM, f"save.background={str(background).lower()}"]
    stopped = start("stopped", *extra, **options)
    stopped.wait_until(reached(tmp_path / "stopped", 5))
    for _ in range(3):
        stopped.processes[1].send_signal(number)
    stopped.wait_until(lambda: "stopped by" in stopped.said()[0])
    while None in [process.poll() for process in stopped.processes]:
        for process in stopped.processes:
            process.send_signal(number)
        time.sleep(0.01)
    assert stopped.wait() == [0, 0], stopped.said()
    found = re.search(r"stopped by .* after step (\d+); resume=auto goes on", stopped.said()[0])
    step = int(found[1])
    assert 5 <= step < STEPS
    assert checkpoint.newest(tmp_path / "stopped").name == f"step_{step:08d}"
    assert len(curve(tmp_path / "stopped")) == step
    word = tmp_path / "stopped" / STOPPED  # for launchers, which cannot tell it from a run that is done
    assert word.read_text().endswith(f" after step {step}\n")
    assert start("stopped", "resume=auto", *extra, **options).wait() == [0, 0]
    assert not word.exists()
    assert_same_run(tmp_path / "stopped", whole)


@pytest.mark.parametrize("how", slow_but(["dead"], ["dead", "hanging"]))
def test_a_lost_rank_ends_the_others(start, tmp_path, how):
    """The other says so in one line, within the timeout also in the engine's own groups; a whole checkpoint stays."""
    program = [fault_worker.__file__] if how == "hanging" else None
    ranks = start("run", "train.timeout_s=8", count=2, env={**zero(2), "FAULT": how}, program=program)
    ranks.wait_until((tmp_path / "run" / "checkpoints" / "latest").exists)
    began = time.monotonic()
    if how == "dead":
        ranks.processes[1].kill()
    assert ranks.processes[0].wait(60) == 2, ranks.said()[0]
    assert time.monotonic() - began < 30
    (line,) = errors_of(ranks)
    assert line.startswith("error: rank 0: rank 1 died, or did not answer for train.timeout_s=8 (")
    assert line.endswith("; start again with resume=auto")
    assert checkpoint.damage(checkpoint.newest(tmp_path / "run")) is None


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_all(start):
    """Its traceback is shown, and its loader's worker, which no SIGTERM reaches, does not keep it alive."""
    ranks = start("run", count=2, env={**zero(2), "FAULT": "bug"}, program=[fault_worker.__file__])
    assert ranks.wait(60) == [2, 1], ranks.said()
    assert ranks.said()[1].rstrip().endswith("RuntimeError: a bug")
    assert errors_of(ranks)[0].startswith("error: rank 0: rank 1 died")


@pytest.mark.slow
def test_a_lost_worker_of_the_loader_ends_the_run(start, tmp_path):
    """As when memory runs out: one line."""
    ranks = start("run", "optim.steps=10000")
    ranks.wait_until(reached(tmp_path / "run", 3))
    for worker in psutil.Process(ranks.processes[0].pid).children():
        worker.kill()
    assert ranks.wait(60) == [2], ranks.said()
    (line,) = errors_of(ranks)
    assert "rank 0: a worker of the data loader died; when memory was short, lower data.num_workers (" in line


@pytest.mark.parametrize("engine", slow_but(["zero2"], ["ddp", "zero2", "zero3"]))
def test_nan_on_one_rank_is_skipped_by_all(start, tmp_path, engine):
    """A gradient, then a feature: two steps change nothing, the log names rank and samples, the run goes on."""
    env = {"FAULT": "nan", **({} if engine == "ddp" else zero(int(engine[-1])))}
    ranks = start("run", "optim.steps=8", "save.every_steps=1", "save.keep_last=9", count=2, env=env,
                  program=[fault_worker.__file__])  # fmt: skip
    assert ranks.wait() == [0, 0], ranks.said()
    rows = curve(tmp_path / "run")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2, 2, 2, 2]
    said = ranks.said()[0]
    assert re.search(r"step 3: a gradient is not finite: the gradient of text on rank 1 \(sample ids \d+\); skip", said)
    assert re.search(
        r"step 5: loss/clip.* not finite on arrival: student image on rank 1 \(sample ids \d+\); ski", said
    )
    for before, after in ((2, 3), (4, 5)):
        folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" / "state" for step in (before, after)]
        for file in ("weights", "exp_avg", "exp_avg_sq", "objective", "memory_00000_of_00001"):
            old, new = (load_file(folder / f"{file}.safetensors") for folder in folders)
            for name, tensor in old.items():
                assert torch.equal(tensor.nan_to_num(), new[name].nan_to_num()), f"{file} {name}: step {after}"
    assert rows[-1]["loss"] < 1e6


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_nothing_else(start, tmp_path):
    """Files above a limit cannot be written: training goes on, the old checkpoint stays; the last one ends the run."""
    first = start("run", "optim.steps=6")
    assert first.wait() == [0]
    before = checkpoint.newest(tmp_path / "run")
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
    limit += " sys.argv = ['kd_accel', *sys.argv[1:]]; runpy.run_module('kd_accel', run_name='__main__')"
    full = start("run", "resume=auto", "optim.steps=12", program=["-c", limit])
    assert full.wait() == [2], full.said()
    said = full.said()[0]
    assert "ERROR | the checkpoint of step 9 could not be written (rank 0: " in said
    assert len(curve(tmp_path / "run")) == 12
    (line,) = errors_of(full)
    assert "the checkpoint of step 12 could not be written" in line
    assert f"the newest whole one: {before}:" in line
    assert checkpoint.newest(tmp_path / "run") == before
    assert checkpoint.damage(before) is None
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own: 48 MiB, two checkpoints of 15 and some."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", folder]).returncode:
        pytest.skip("needs root, and the right to mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.root
def test_a_disk_without_a_byte_left(start, small_disk, tmp_path):
    """Neither rows nor lines fit: training goes on to its end, which is one line; with room again, the same run."""
    extra = ["optim.steps=60", "save.keep_last=1"]
    assert start("whole", *extra).wait() == [0]
    full = start("run", f"output_dir={small_disk}", *extra)
    full.wait_until(reached(small_disk / "run", 4))
    with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    assert full.wait() == [2], full.said()
    (line,) = errors_of(full)
    assert "the checkpoint of step 60 could not be written" in line
    assert "Traceback" not in full.said()[0]
    assert "metrics.jsonl: a row could not be written ([Errno 28] No space left on device)" in full.said()[0]
    (small_disk / "ballast").unlink()
    assert start("run", f"output_dir={small_disk}", "resume=auto", *extra).wait() == [0]
    assert_same_run(small_disk / "run", tmp_path / "whole")


@pytest.mark.parametrize(("resume", "count"), slow_but([("never", 2)], [("never", 2), ("auto", 1)]))
def test_a_folder_that_cannot_be_written(start, tmp_path, resume, count):
    """One line at the start, of one rank; a file is where the folder should be, which stops root too."""
    (tmp_path / "file").write_text("")
    ranks = start("run", f"output_dir={tmp_path / 'file' / 'runs'}", f"resume={resume}", count=count)
    assert ranks.wait() == [2] * count
    (line,) = [line for said in ranks.said() for line in said.splitlines() if "rror" in line]
    assert line.startswith("error: output_dir=")
    assert "cannot be written to" in line
