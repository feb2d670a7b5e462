"""What the processes of a run say to each other. Every function also works in one process without a process group.

b rows of this rank, B = b * world_size rows of all ranks, in rank order. No autograd runs through a collective:
features are gathered detached and their gradients are summed by hand, which is exact under DDP and every ZeRO stage
(torch.distributed.nn.all_gather is deprecated, and on gloo permutes non-contiguous gradients without a word).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kd_accel.schema import ConfigError
from kd_accel.timing import span

K = TypeVar("K")


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
    """Every rank's rows of each tensor: [b, ...] -> [B, ...], detached, in one collective.

    All tensors share b and a dtype; b is the same on every rank.
    """
    if world_size() == 1 or not rows:
        return {name: tensor.detach() for name, tensor in rows.items()}
    with span("gather"):
        flat = [tensor.detach()[:, None].flatten(start_dim=1) for tensor in rows.values()]  # [b, d_k] each
        packed = torch.cat(flat, dim=1).contiguous()  # [b, sum d_k]
        everyone = [torch.empty_like(packed) for _ in range(world_size())]
        dist.all_gather(everyone, packed)
    columns = torch.cat(everyone).split([part.shape[1] for part in flat], dim=1)
    shapes = {name: (-1, *tensor.shape[1:]) for name, tensor in rows.items()}
    return {n: c.reshape(shape).contiguous() for (n, shape), c in zip(shapes.items(), columns, strict=True)}


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


def _median_time(act: Callable[[], None], device: torch.device) -> float:
    """Of five times; one before them is not counted, because it makes the connection."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])
