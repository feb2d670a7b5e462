"""Two hosts, a process on each, `accelerate launch` as in the launch files: the run of one host, also over a slow wire;
a cut wire or a dead host is said within train.timeout_s, and costs the steps since the last checkpoint."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import REPO, run_process
from distributed.hosts import Hosts
from distributed.test_faults import SELDOM, Ranks, assert_same_run, errors_of, reached
from distributed.test_launch import ACCELERATE
from distributed.test_resume import SHARDED, command, zero

from kd_accel import checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1200)]

LAUNCH = [*ACCELERATE, "--config_file", "launch/zero2.yaml", "--num_processes", "2"]
TIMEOUT = "train.timeout_s=15"


class Launchers(Ranks):
    """An `accelerate launch` on each host; both write to the same folder, as on a shared file system."""

    def __init__(self, hosts: Hosts, words: list[str], folder: Path, interface: str | None = None):
        folder.mkdir()
        self.logs = [folder / f"host{host}.log" for host in (0, 1)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
        env.pop("GLOO_SOCKET_IFNAME", None)
        env |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
        self.processes = []
        for host, log in enumerate(self.logs):
            place = ["--num_machines", "2", "--machine_rank", str(host)]
            place += ["--main_process_ip", hosts.ADDRESSES[0], "--main_process_port", "29500"]
            own = [*LAUNCH, *place, *words[len(LAUNCH) :]]
            with log.open("w") as file:
                self.processes.append(hosts.popen(host, own, cwd=REPO, env=env, stdout=file, stderr=file))


@pytest.fixture(scope="module", autouse=True)
def _namespaces():
    try:
        with Hosts():
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs root, the command ip and network namespaces ({error})")


@pytest.fixture
def words(tmp_path, train_shards, tiny_teacher):
    """A function to the command line of the run `name`."""
    return lambda name, *extra: command(LAUNCH, tmp_path, train_shards, tiny_teacher, name, SHARDED, *extra)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, train_shards, tiny_teacher):
    """The same two processes on one host."""
    folder = tmp_path_factory.mktemp("one_host")
    run_process(command(LAUNCH, folder, train_shards, tiny_teacher, "run", SHARDED), env=zero(2))
    return folder / "run"


@pytest.fixture
def hosts():
    with Hosts() as hosts:
        yield hosts


@pytest.mark.parametrize("delay_s", [0, 0.025])
def test_two_hosts_are_one(delay_s, one_host, words, tmp_path):
    """Nothing but the address is given: gloo takes the interface that leads there. The same bits, also where every
    answer takes 50 ms longer."""
    with Hosts(delay_s=delay_s) as hosts, Launchers(hosts, words("run", SELDOM), tmp_path / "log") as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert_same_run(tmp_path / "run", one_host)


def test_a_cut_wire_is_said_on_both_sides(hosts, one_host, words, tmp_path):
    """In one line each, with a whole checkpoint on the disk; mended and started again, the run is the whole one."""
    with Launchers(hosts, words("run", TIMEOUT), tmp_path / "log") as ranks:
        ranks.wait_until(reached(tmp_path / "run", 5))
        hosts.cut()
        assert ranks.wait() == [1, 1], ranks.said()
    errors = errors_of(ranks)
    assert [line.partition(" (")[0] for line in errors] == [
        f"error: rank {rank}: rank {1 - rank} died, or did not answer for {TIMEOUT}" for rank in (0, 1)
    ]
    assert all(line.endswith("; start again with resume=auto") for line in errors)
    assert checkpoint.damage(checkpoint.newest(tmp_path / "run")) is None
    hosts.mend()
    with Launchers(hosts, words("run", TIMEOUT, "resume=auto"), tmp_path / "again") as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert_same_run(tmp_path / "run", one_host)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_host_costs_the_steps_since_the_last_checkpoint(dead, hosts, one_host, words, tmp_path):
    """kill -9 of all its processes: the other says so; both started again, the run is the whole one."""
    with Launchers(hosts, words("run", TIMEOUT), tmp_path / "log") as ranks:
        ranks.wait_until(reached(tmp_path / "run", 5))
        hosts.kill(dead)
        assert sorted(ranks.wait()) == [-9, 1], ranks.said()
    (line,) = errors_of(ranks)
    assert line.startswith(f"error: rank {1 - dead}: rank {dead} died, or did not answer for {TIMEOUT} (")
    with Launchers(hosts, words("run", TIMEOUT, "resume=auto"), tmp_path / "again") as ranks:
        assert ranks.wait() == [0, 0], ranks.said()
    assert_same_run(tmp_path / "run", one_host)


def test_hosts_that_do_not_come_together_say_so(hosts, words, tmp_path):
    """Without an interface between them: a line each instead of torch's stack, and nothing written."""
    with Launchers(hosts, words("run", TIMEOUT), tmp_path / "log", interface="lo") as ranks:
        assert ranks.wait() == [1, 1], ranks.said()
    found = f"(MASTER_ADDR={hosts.ADDRESSES[0]}, MASTER_PORT=29500, GLOO_SOCKET_IFNAME=lo): "
    said = [line.partition(found)[0] for line in errors_of(ranks)]
    assert said == [f"error: rank {rank}: the 2 processes do not find each other " for rank in (0, 1)]
    assert not (tmp_path / "run").exists()
