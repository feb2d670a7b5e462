"""Who is there, and who is not, before there is a process group."""

from __future__ import annotations

import itertools
import socket
import threading

import pytest

from kd_accel import distributed
from kd_accel.doctor import rendezvous
from kd_accel.doctor.rendezvous import Answer, attendance, rounds
from kd_accel.schema import ConfigError


def answer(
    host: str = "a", address: str | None = "10.0.0.1", backend: str = "gloo", interface: str | None = None
) -> Answer:
    return Answer(host, address, backend, interface, [])


def test_an_answer_arrives_as_it_was_sent():
    sent = Answer.of_this_rank([rendezvous.Finding("ok", "x", "y")])
    assert Answer.unpacked(sent.packed()) == sent
    assert sent.host == socket.gethostname()


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        ([answer(), answer()], "ok", "2 ranks on 1 machine"),
        ([answer(), answer("b", "10.0.0.2")], "ok", "2 ranks on 2 machines"),
        ([answer(), None, answer("b"), None], "FAIL", "ranks 1, 3 did not come within 5 s; 2 of 4 are there, on a, b"),
        ([answer(backend="nccl"), answer()], "FAIL", "rank 1 see no GPU"),
        ([answer(), answer("b", "127.0.1.1")], "FAIL", "the names of b resolve to no address"),
        ([answer(), answer("b", "fe80::1%eth0")], "ok", "2 ranks on 2 machines"),
        ([answer(), answer("b", "::1")], "FAIL", "set GLOO_SOCKET_IFNAME"),
        ([answer(), answer("b", None)], "FAIL", "set GLOO_SOCKET_IFNAME"),
        ([answer(), answer("b", "127.0.1.1", interface="eth0")], "ok", "2 ranks on 2 machines"),
        ([answer(address="127.0.0.1"), answer(address="127.0.0.1")], "ok", "2 ranks on 1 machine"),
    ],
)
def test_attendance(answers, status, said):
    (found,) = attendance(answers, timeout_s=5)
    assert found.status == status
    assert said in found.said


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    members = [10 * i for i in range(count)]
    played = rounds(members)
    pairs = [frozenset(pair) for matches in played for pair in matches]
    assert sorted(map(sorted, pairs)) == sorted(map(sorted, itertools.combinations(members, 2)))
    for matches in played:
        busy = [member for pair in matches for member in pair]
        assert len(busy) == len(set(busy))


@pytest.fixture
def as_rank(monkeypatch, free_port):
    """A function: this process's place in a launch by hand."""
    distributed._store.cache_clear()

    def pretend(rank: int, world_size: int, port: int = free_port) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    yield pretend
    distributed._store.cache_clear()


def test_ranks_that_do_not_come_are_known_by_their_number(as_rank):
    as_rank(0, 3)
    assert distributed.roll_call("here", timeout_s=1) == ["here", None, None]


def test_nobody_at_the_port(as_rank, free_port):
    """As with a wrong port: it ends in time, and says where it looked."""
    as_rank(1, 2)
    with pytest.raises(ConfigError, match=f"rank 0 does not answer at 127.0.0.1:{free_port} within 1 s: .*MASTER_PORT"):
        distributed.roll_call("here", timeout_s=1)


def test_a_port_that_is_taken(as_rank):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        as_rank(0, 2, other.getsockname()[1])
        with pytest.raises(ConfigError, match="is taken by another program: choose another port"):
            distributed.roll_call("here", timeout_s=5)


def test_somebody_at_the_port_who_says_nothing(as_rank):
    """Another service, or a firewall that lets connections hang."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        thread = threading.Thread(target=other.accept, daemon=True)
        thread.start()
        as_rank(1, 2, other.getsockname()[1])
        with pytest.raises(ConfigError, match="does not answer at"):
            distributed.roll_call("here", timeout_s=2)
        thread.join(5)
