"""What is said of who came and who did not, and that every pair of hosts meets."""

from __future__ import annotations

import itertools
import socket

import pytest

from kd_accel.doctor import rendezvous
from kd_accel.doctor.rendezvous import Answer, attendance, rounds


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
