"""The only file that talks to torch.distributed. Every function also works in one process without a process group.

b rows of this rank, B = b * world_size rows of all ranks, in rank order. No autograd runs through a collective:
features are gathered detached and their gradients are summed by hand, which is exact under DDP and every ZeRO stage
(torch.distributed.nn.all_gather is deprecated, and on gloo permutes non-contiguous gradients without a word).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from statistics import median
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kd_accel.schema import ConfigError, LocalError
from kd_accel.timing import span

K = TypeVar("K")


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


def world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, 0 <= rank < world_size."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def gather_rows(rows: dict[K, Tensor]) -> dict[K, Tensor]:
    """Every rank's rows of each tensor: [b, d_k] -> [B, d_k], detached, in one collective.

    All tensors share b and a dtype; b is the same on every rank.
    """
    if world_size() == 1 or not rows:
        return {name: tensor.detach() for name, tensor in rows.items()}
    with span("gather"):
        packed = torch.cat([tensor.detach() for tensor in rows.values()], dim=1).contiguous()  # [b, sum d_k]
        everyone = [torch.empty_like(packed) for _ in range(world_size())]
        dist.all_gather(everyone, packed)
    columns = torch.cat(everyone).split([tensor.shape[1] for tensor in rows.values()], dim=1)
    return {name: column.contiguous() for name, column in zip(rows, columns, strict=True)}


@torch.no_grad()
def gather_uneven_rows(rows: Tensor) -> Tensor:
    """Every rank's rows, in rank order, detached: [b, ...] -> [B, ...]; b may differ between ranks and may be 0."""
    counts = gather_objects(len(rows))
    if world_size() == 1 or not sum(counts):
        return rows.detach()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([theirs[:count] for theirs, count in zip(everyone, counts, strict=True)])


@torch.no_grad()
def sum_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """The element-wise sum over ranks of each tensor, in one collective; shapes and dtype are alike on every rank."""
    if world_size() == 1 or not tensors:
        return tensors
    with span("gather"):
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
    return [
        part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
    ]


def any_rank(flags: list[bool]) -> list[bool]:
    """For each flag, whether some rank raises it; one small collective."""
    if world_size() == 1:
        return flags
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has cut, whole on every rank; any other one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def cut_like(value: Tensor, tensor: Tensor) -> Tensor:
    """This rank's part of `value`, which is alike on every rank, as FSDP2 has cut `tensor`; else `value`."""
    return distribute_tensor(value, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else value


def time_sum(num_bytes: int, device: torch.device) -> float:
    """Seconds that an all-reduce of so many bytes takes, the median of five; collective."""
    buffer = torch.zeros(num_bytes // 4, device=device)
    return _median_time(lambda: dist.all_reduce(buffer), device)


def time_exchange(partner: int | None, num_bytes: int, device: torch.device) -> float | None:
    """Seconds until this rank and `partner` have so many bytes of each other, the median of five.

    None for a rank without partner. Collective: partners are each other's, and all ranks begin together.
    """
    barrier()
    if partner is None:
        return None
    mine, theirs = torch.zeros(2, num_bytes // 4, device=device)

    def exchange() -> None:
        ways = [dist.P2POp(dist.isend, mine, partner), dist.P2POp(dist.irecv, theirs, partner)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()

    return _median_time(exchange, device)


def _median_time(act: Callable[[], None], device: torch.device, times: int = 5) -> float:
    """The first time is not counted: it makes the connection."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order; for small picklable things of our own, never for tensors or user files."""
    if world_size() == 1:
        return [value]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def second_group() -> dist.ProcessGroup | None:
    """All ranks once more, for a thread beside the training: of one group every rank must call the collectives in turn.

    Of CPU tensors, whatever the device. Collective.
    """
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def to_main(said: Any, values: Tensor, *, group: dist.ProcessGroup | None) -> Iterator[tuple[Any, Tensor]]:
    """On rank 0 what every rank says and its `values`, [n] on the CPU, rank by rank; nothing elsewhere; collective.

    n may differ between ranks and may be 0; every rank walks to the end.
    """
    if world_size() == 1:
        yield said, values
        return
    everyone = [None] * world_size() if is_main() else None
    dist.gather_object((said, len(values)), everyone, group=group)
    if not is_main():
        if len(values):
            dist.send(values, 0, group=group)
        return
    yield said, values
    for rank_of, (theirs, size) in enumerate(everyone[1:], start=1):
        received = values.new_empty(size)
        if size:
            dist.recv(received, rank_of, group=group)
        yield theirs, received


def from_main(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def failing_together() -> Iterator[None]:
    """Whatever OSError or ConfigError some rank meets inside, every rank raises as ConfigError at the end; collective.

    The block itself has no collectives.
    """
    failed = None
    try:
        yield
    except (OSError, ConfigError) as error:
        failed = str(error)
    failures = [said for said in gather_objects(failed) if said is not None]
    if failures:
        raise ConfigError(failures[0])


def on_main(act: Callable[[], None]) -> None:
    """Rank 0 acts, the others wait. Raises ConfigError, on every rank, where that fails; collective."""
    with failing_together():
        if is_main():
            act()


LOST = ("closed by peer", "Connection reset", "Timed out waiting", "timed out after", "Broken pipe", "NCCL", "gloo")


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process died or does not answer; torch only says so in words."""
    return world_size() > 1 and isinstance(error, RuntimeError) and any(words in str(error) for words in LOST)


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the stack that it brings."""
    return str(error).strip().partition("\n")[0]


def end_process(code: int) -> None:
    """End a process that belongs to a group, or has looked for one, at once, with exit code `code`; else return.

    The interpreter's own clean-up would, now and then, meet a gloo thread that still holds a finished collective's
    tensors, and abort a run that was complete (SIGABRT, "terminate called without an active exception").
    """
    if not dist.is_initialized() and not _store.cache_info().misses:  # its thread may still wait for an answer
        return
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
