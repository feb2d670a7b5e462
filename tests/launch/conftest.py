"""A SLURM of two nodes on this machine: the daemons of Debian, with all of their files in one folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
# a requeued job waits until its old credential has run out: 120 s by default
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """A function that runs a command of SLURM (sbatch, squeue, ...) with `env` added, and returns what it prints.

    The nodes n1 and n2 have 64 processors and 8 GPUs each, as far as SLURM knows.
    """
    if os.geteuid() != 0:
        pytest.skip("a SLURM of one's own needs root")
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install --no-install-recommends slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    conf = _write_files(folder)

    def run(*command: str, env: dict[str, str] | None = None) -> str:
        environment = {**os.environ, "SLURM_CONF": str(conf), **(env or {})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}\n{_logs(folder)}"
        return done.stdout

    try:
        _start(folder, run)
        yield run
        run("scancel", "--full", "--user=root")
        run("srun", "--nodes=2", "--ntasks=2", "true")  # behind whatever was cancelled
    finally:
        _stop(folder)


def _write_files(folder: Path) -> Path:
    """Configuration, munge's key, files in the place of GPUs; returns slurm.conf."""
    for name in ("state", "spool/n1", "spool/n2", "munge", "dev"):
        (folder / name).mkdir(parents=True)
    for above in (folder, *folder.parents):  # munge refuses a socket that others cannot get to
        if above.owner() == "root":
            above.chmod(above.stat().st_mode | 0o011)
    key = folder / "munge/munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for gpu in range(8):
        (folder / f"dev/nvidia{gpu}").touch()
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/dev/nvidia[0-7]\n")
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname().partition(".")[0], ports=_free_ports(3), folder=folder))
    return conf


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _start(folder: Path, run: Callable[..., str]) -> None:
    """The daemons, until both nodes are idle."""
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
    run("munged", *[f"--{key}={folder}/munge/{name}" for key, name in {**files, "seed-file": "seed"}.items()])
    run("slurmctld", "-f", f"{folder}/slurm.conf", "-c")
    for node in ("n1", "n2"):
        run("slurmd", "-f", f"{folder}/slurm.conf", "-N", node)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(AssertionError):  # slurmctld does not answer yet
            if run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle", "idle"]:
                return
        time.sleep(0.5)
    pytest.fail(f"the nodes do not become idle\n{_logs(folder)}")


def _stop(folder: Path) -> None:
    """End the daemons and whatever they started."""
    for file in [*folder.glob("slurmd-*.pid"), folder / "slurmctld.pid", folder / "munge/munged.pid"]:
        with suppress(psutil.NoSuchProcess, FileNotFoundError, ValueError):
            daemon = psutil.Process(int(file.read_text()))
            daemon.terminate()
            daemon.wait(20)


def _logs(folder: Path) -> str:
    return "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log")))
