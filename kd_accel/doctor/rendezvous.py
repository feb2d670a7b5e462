"""Whether all processes meet, mean the same training, and how fast they are with each other.

R ranks on N hosts.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from statistics import median
from typing import Any

import torch

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig
from kd_accel.doctor.environment import SHOWN
from kd_accel.doctor.findings import Finding, named
from kd_accel.environment import installed
from kd_accel.schema import flat

MESSAGE = 2**20  # bytes
MAX_SKEW_S = 1.0
SLOW_LINK = 3.0  # times the median


@dataclass(frozen=True)
class Answer:
    """What a rank says of itself before there is a process group."""

    host: str
    address: str | None  # the first to which its host's name resolves, which is what gloo offers to others
    backend: str  # of collectives: nccl or gloo
    socket: str | None  # network interface that gloo takes, where somebody chose one
    findings: list[Finding]

    @classmethod
    def of_this_rank(cls, findings: list[Finding]) -> Answer:
        """With what this process found by itself."""
        host = socket.gethostname()
        with suppress(OSError):  # an address that cannot be reached is found by the roll call
            processes.choose_interface(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        try:
            address = socket.getaddrinfo(host, None)[0][4][0]
        except OSError:
            address = None
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        return cls(host, address, backend, os.environ.get("GLOO_SOCKET_IFNAME"), findings)

    def packed(self) -> str:
        """As text, for the roll call."""
        return json.dumps(asdict(self))

    @classmethod
    def unpacked(cls, text: str) -> Answer:
        """What `packed` was made of."""
        values = json.loads(text)
        return cls(**values | {"findings": [Finding(**finding) for finding in values["findings"]]})


def attendance(answers: Sequence[Answer | None], timeout_s: float) -> list[Finding]:
    """Who did not come; whether those who did can talk to each other."""
    present = [answer for answer in answers if answer is not None]
    hosts = list(dict.fromkeys(answer.host for answer in present))
    if missing := [rank for rank, answer in enumerate(answers) if answer is None]:
        said = f"{named(missing)} did not come within {timeout_s:g} s; {len(present)} of {len(answers)} are there, on"
        fix = "see that every machine runs the command with its own rank and the same address, port and sizes"
        return [Finding("FAIL", "rendezvous", f"{said} {', '.join(hosts)}: {fix}")]
    if len({answer.backend for answer in present}) > 1:
        cpu = [rank for rank, answer in enumerate(present) if answer.backend == "gloo"]
        return [
            Finding("FAIL", "rendezvous", f"{named(cpu)} see no GPU, the others do: they cannot talk to each other")
        ]
    lost = [h for h in hosts for a in present if a.host == h and _is_unreachable(a)] if len(hosts) > 1 else []
    if lost:
        said = f"the names of {', '.join(dict.fromkeys(lost))} resolve to no address that other machines can reach"
        return [Finding("FAIL", "rendezvous", f"{said}: set GLOO_SOCKET_IFNAME to their network interface")]
    return [Finding("ok", "rendezvous", f"{len(present)} ranks on {len(hosts)} machine{'s' * (len(hosts) > 1)}")]


def _is_unreachable(answer: Answer) -> bool:
    is_local = answer.address is None or ip_address(answer.address).is_loopback
    return answer.backend == "gloo" and answer.socket is None and is_local


def agreement(config: TrainConfig | None) -> list[Finding]:
    """Clocks, config, packages and drawn numbers of all ranks, as against those of rank 0; collective."""
    found = [_clocks()]
    if config is not None:
        keys = flat(config.model_dump(mode="json"))
        found += _differences("config", keys, "every machine needs the same files and values")
        torch.manual_seed(config.seed)
        drawn = {"the first numbers": hashlib.sha256(torch.randn(4096).numpy().tobytes()).hexdigest()[:12]}
        found += _differences("seed", drawn, "initial weights would differ: install the same torch everywhere")
    packages = {name: installed(name) for name in ("kd_accel", *SHOWN)}
    return [*found, *_differences("packages", packages, "install the same ones everywhere")]


def _differences(what: str, mine: dict[str, Any], fix: str) -> list[Finding]:
    everyone = distributed.gather_objects(mine)
    first = everyone[0]
    found = []
    for key in dict.fromkeys(key for theirs in everyone for key in theirs):
        others = [rank for rank, theirs in enumerate(everyone) if theirs.get(key) != first.get(key)]
        if others:
            theirs = everyone[others[0]].get(key)
            said = f"{named(others)}: {key} is {theirs!r}, on rank 0 {first.get(key)!r}: {fix}"
            found.append(Finding("FAIL", what, said))
    return found or [Finding("ok", what, "the same on all ranks")]


def _clocks() -> Finding:
    """The best of a few looks: a rank that comes late looks ahead."""
    looks = []
    for _ in range(5):
        distributed.barrier()
        looks.append(distributed.gather_objects(time.time()))
    offsets = [min((look[rank] - look[0] for look in looks), key=abs) for rank in range(len(looks[0]))]
    off = [rank for rank, offset in enumerate(offsets) if abs(offset) > MAX_SKEW_S]
    if not off:
        return Finding("ok", "clocks", f"within {max(map(abs, offsets)):.2g} s of rank 0's")
    said = f"{named(off)}: up to {max(offsets, key=abs):+.1f} s beside rank 0's, so logs do not fit together: use NTP"
    return Finding("warn", "clocks", said)


def speed(answers: Sequence[Answer], device: torch.device) -> list[Finding]:
    """A timed all-reduce, and every pair of hosts; collective."""
    seconds = max(distributed.gather_objects(distributed.time_sum(MESSAGE, device)))
    found = [Finding("ok", "all-reduce", f"1 MiB over {len(answers)} ranks in {1e3 * seconds:.2f} ms")]
    firsts = list({answer.host: rank for rank, answer in reversed(list(enumerate(answers)))}.values())
    return found if len(firsts) == 1 else [*found, _links(sorted(firsts), answers, device)]


def _links(firsts: list[int], answers: Sequence[Answer], device: torch.device) -> Finding:
    """The first ranks of all hosts, in pairs."""
    measured: dict[tuple[int, int], float] = {}
    for pairs in rounds(firsts):
        partners = dict(pairs) | {b: a for a, b in pairs}
        mine = distributed.time_exchange(partners.get(distributed.rank()), MESSAGE, device)
        everyone = distributed.gather_objects(mine)
        measured |= {(a, b): max(everyone[a], everyone[b]) for a, b in pairs}
    usual, (worst, seconds) = median(measured.values()), max(measured.items(), key=lambda item: item[1])
    between = f"{answers[worst[0]].host} and {answers[worst[1]].host}"
    times = f"1 MiB both ways in {1e3 * usual:.2f} ms (median of {len(measured)} pairs)"
    if seconds > SLOW_LINK * usual:
        return Finding("warn", "links", f"{times}, but {1e3 * seconds:.2f} ms between {between}: look at that link")
    return Finding("ok", "links", f"{times}, at most {1e3 * seconds:.2f} ms")


def rounds(members: list[int]) -> list[list[tuple[int, int]]]:
    """Every pair of members once; those of a round have no member in common (a round-robin tournament)."""
    seats: list[int | None] = [*members, *[None] * (len(members) % 2)]
    found = []
    for _ in seats[1:]:
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found
