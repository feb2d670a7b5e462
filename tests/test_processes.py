"""Who is there, and who is not, before there is a process group."""

from __future__ import annotations

import socket
import threading

import pytest

from kd_accel import processes
from kd_accel.schema import ConfigError


@pytest.fixture
def as_rank(monkeypatch, free_port):
    """A function: this process's place in a launch by hand."""
    processes._store.cache_clear()

    def pretend(rank: int, world_size: int, port: int = free_port) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    yield pretend
    processes._store.cache_clear()


def test_ranks_that_do_not_come_are_known_by_their_number(as_rank):
    as_rank(0, 3)
    assert processes.roll_call("here", timeout_s=1) == ["here", None, None]


def test_nobody_at_the_port(as_rank, free_port):
    """As with a wrong port: it ends in time, and says where it looked."""
    as_rank(1, 2)
    with pytest.raises(ConfigError, match=f"rank 0 does not answer at 127.0.0.1:{free_port} within 1 s: .*MASTER_PORT"):
        processes.roll_call("here", timeout_s=1)


def test_a_port_that_is_taken(as_rank):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        as_rank(0, 2, other.getsockname()[1])
        with pytest.raises(ConfigError, match="is taken by another program: choose another port"):
            processes.roll_call("here", timeout_s=5)


def test_somebody_at_the_port_who_says_nothing(as_rank):
    """Another service, or a firewall that lets connections hang."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        thread = threading.Thread(target=other.accept, daemon=True)
        thread.start()
        as_rank(1, 2, other.getsockname()[1])
        with pytest.raises(ConfigError, match="does not answer at"):
            processes.roll_call("here", timeout_s=2)
        thread.join(5)
