"""Fixtures that tests of more than one file use: where the data is, a free port, a seed, and runs of several ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import tiny
import warm_python

REPO = Path(__file__).resolve().parent.parent
EXIT_STATUS = pytest.StashKey[int]()
MAY_SKIP = os.environ.get("KD_ACCEL_MAY_SKIP", "")  # regular expression of the reasons that are no failure; "": any


def _folder(variable: str, name: str) -> Path:
    """The folder that the environment variable names, else ../shared/NAME beside the repository; skips without one."""
    folder = Path(os.environ.get(variable, REPO.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"needs the folder {name}: set {variable} to it")
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Real image-caption pairs, zero-shot sets and small weights."""
    return _folder("KD_ACCEL_DATA", "data")


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Inputs and outputs of other people's implementations of the losses."""
    return _folder("KD_ACCEL_GOLDEN", "golden")


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random tensors are the same in every run of a test; tests that never loaded torch need none."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run_ranks() -> Callable[..., str]:
    return _run_ranks


def _run_ranks(args: str | Path | list[str], nproc: int = 2, **how) -> str:
    """Run a Python script (or ["-m", "module", ...]) on `nproc` gloo ranks under torchrun, as run_process does."""
    words = [str(word) for word in args] if isinstance(args, list) else [str(args)]
    # --standalone takes a free port by itself and holds it: no race between two test runs on one machine
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return run_process([*launcher, *words], **how)


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all it has started: torchrun's ranks are in sessions of their own."""
    with suppress(psutil.NoSuchProcess):  # it has just ended by itself
        launcher = psutil.Process(pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def run_process(
    command: list[str], *, env: dict | None = None, timeout: float = 500, code: int = 0, cold: bool = False
) -> str:
    """Run `command` in the repository, without a GPU; its output, stderr included.

    The test fails, and shows the output, unless it ends within `timeout` seconds with `code`. `cold`: its Python
    programs import for themselves, where a test is about their start or their memory.
    """
    path = os.pathsep.join(filter(None, [str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH")]))
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    with (subprocess if cold else warm_python).Popen(
        command,
        cwd=REPO,
        env={**os.environ, **quiet, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process.pid)
            output, _ = process.communicate()
            pytest.fail(f"{' '.join(command)}\nwas still running after {timeout} s\n{output}")
    if process.returncode != code:
        pytest.fail(f"{' '.join(command)}\nended with {process.returncode} instead of {code}\n{output}")
    return output


@pytest.fixture(scope="session")
def train_shards(tmp_path_factory) -> Path:
    """40 captioned pictures in two indexed shards; read only."""
    return tiny.write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """The release directory of an untrained CLIP; read only."""
    return tiny.write_teacher(tmp_path_factory.mktemp("teacher") / "release")


@pytest.fixture
def own_handlers():
    """The signals' handlers are again those of this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_sessionfinish(session, exitstatus) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and reporter is not None:
        reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
        for reason in sorted(reason for reason in reasons if not re.search(MAY_SKIP, reason)):
            reporter.write_line(f"skipped, which KD_ACCEL_MAY_SKIP does not allow: {reason}", red=True)
            session.exitstatus = exitstatus = 1
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config) -> None:
    """Tests of the engine leave a process group of one behind, and with it the end described in end_process."""
    if "kd_accel.processes" in sys.modules and EXIT_STATUS in config.stash:
        sys.modules["kd_accel.processes"].end_process(config.stash[EXIT_STATUS])
