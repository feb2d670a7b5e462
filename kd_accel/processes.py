"""The processes of a run: how they find each other, how long they wait, how each of them ends.

Torchrun or accelerate started them and left in the environment which they are (RANK, LOCAL_RANK, WORLD_SIZE) and where
they meet (MASTER_ADDR, MASTER_PORT). What they then say to each other is in distributed.py.
"""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from typing import Any

import psutil
import torch
import torch.distributed as dist

from kd_accel.leave import leave
from kd_accel.schema import ConfigError, LocalError


def start_process_group(timeout_s: float) -> None:
    """Join the processes that torchrun or accelerate launched (NCCL with CUDA, else gloo); does nothing when alone.

    A rank that waits longer than `timeout_s` seconds for another one ends the run with an error. Raises LocalError
    where they do not come together.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        choose_interface(os.environ["MASTER_ADDR"])
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, timeout=timeout, **_place_of_this_attempt(timeout))
    except (OSError, RuntimeError) as error:
        names = "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"
        given = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise LocalError(
            f"rank {os.environ['RANK']}: the {os.environ['WORLD_SIZE']} processes do not find each other ({given}):"
            f" {first_line(error)}; kd-accel doctor, launched in the same way, looks for the reason"
        ) from error


def _place_of_this_attempt(timeout: timedelta) -> dict[str, Any]:
    """Where init_process_group meets, when torchrun may start the processes of one machine again.

    Its store outlives them: without a prefix those of the next attempt would read the addresses of the dead.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or env["LOCAL_WORLD_SIZE"] != env["WORLD_SIZE"]:
        return {}
    store = dist.PrefixStore(f"attempt_{env['TORCHELASTIC_RESTART_COUNT']}", _connect(timeout))
    return {"store": store, "rank": int(env["RANK"]), "world_size": int(env["WORLD_SIZE"])}


def choose_interface(address: str) -> None:
    """Let gloo use the network interface that leads to `address`, where that is not this machine alone.

    By itself it takes the one that the host's own name resolves to, which is the loopback on many machines. Raises
    OSError for an address that cannot be reached.
    """
    family, *_, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        own = probe.getsockname()[0]
    if ip_address(own).is_loopback:
        return
    for name, addresses in psutil.net_if_addrs().items():
        if any(own == found.address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


@cache
def _store(timeout_s: float) -> dist.Store:
    """The launcher's key-value store, or that of rank 0, through which processes find each other.

    Raises DistError or TimeoutError. torch alone would wait without end for a server that listens and says nothing.
    """
    connected: Future[dist.Store] = Future()

    def connect() -> None:
        try:
            connected.set_result(_connect(timedelta(seconds=timeout_s)))
        except dist.DistError as error:
            connected.set_exception(error)

    threading.Thread(target=connect, daemon=True).start()
    return connected.result(timeout_s + 1)


def _connect(timeout: timedelta) -> dist.Store:
    with_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not with_agent,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # the process group to come meets at the same port
    )


def roll_call(said: str, timeout_s: float) -> list[str | None]:
    """What every rank says, in rank order, None for one that does not come in time; before there is a process group.

    The first that is there may then speak, and has to call `end_roll_call`, as all others do.
    Raises ConfigError where nobody can be reached.
    """
    keys, mine = _roll_call_keys("here")
    try:
        store = _store(timeout_s)
        store.set(mine, said)
        with suppress(dist.DistStoreError):  # the deadline
            store.wait(keys, timedelta(seconds=timeout_s))
        return [store.get(key).decode() if store.check([key]) else None for key in keys]
    except (dist.DistError, TimeoutError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(_why_not_met(error, address, timeout_s)) from None


def end_roll_call(answers: list[str | None], timeout_s: float) -> None:
    """Wait, for a few seconds at most, until all who answered are here: a launcher ends them as soon as one ends."""
    keys, mine = _roll_call_keys("done")
    present = [key for key, answer in zip(keys, answers, strict=True) if answer is not None]
    with suppress(dist.DistError):
        _store(timeout_s).set(mine, "")
        _store(timeout_s).wait(present, timedelta(seconds=5))


def _roll_call_keys(word: str) -> tuple[list[str], str]:
    """(everyone's, this rank's) key in the store; a restarted group does not read those of the one before."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"kd_accel/{attempt}/{word}/{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
    return keys, keys[int(os.environ["RANK"])]


def _why_not_met(error: Exception, address: str, timeout_s: float) -> str:
    if "EADDRINUSE" in str(error):
        return f"{address} is taken by another program: choose another port (main_process_port, MASTER_PORT)"
    return (
        f"rank 0 does not answer at {address} within {timeout_s:g} s: compare address and port (main_process_ip and"
        " main_process_port, or MASTER_ADDR and MASTER_PORT) on all machines, and let a firewall pass it"
    )


def wait_at_most(timeout_s: float) -> None:
    """Let groups that are made from here on give up on a rank after `timeout_s` seconds.

    Engines make some of their own without a word about time, and would wait for torch's default of half an hour.
    """
    timeout = timedelta(seconds=timeout_s)
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout


def end_process(code: int) -> None:
    """End a process that belongs to a group, or has looked for one, at once, with exit code `code`; else return.

    The interpreter's own clean-up would, now and then, meet a gloo thread that still holds a finished collective's
    tensors, and abort a run that was complete (SIGABRT, "terminate called without an active exception").
    """
    if not dist.is_initialized() and not _store.cache_info().misses:  # its thread may still wait for an answer
        return
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    leave(code)


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the stack that it brings."""
    return str(error).strip().partition("\n")[0]
