"""What ends a process from outside, said in one line: a lost rank, a lost loader worker, memory that is short."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kd_accel import distributed
from kd_accel.data.workers import is_lost_worker
from kd_accel.processes import first_line
from kd_accel.schema import LocalError, LostPeerError

PEER = ("closed by peer", "Connection reset", "Timed out waiting", "timed out after", "Broken pipe", "NCCL", "gloo")


@contextmanager
def told_in_one_line(*, waited: str, workers: str, smaller: str, then: str) -> Iterator[None]:
    """Inside, each of them raises LocalError.

    `waited`: how long a rank that hangs is waited for; `workers`: the key of their number; `smaller`: what takes less
    memory; `then`: how it goes on.
    """
    try:
        yield
    except RuntimeError as error:
        kind = LocalError
        if is_lost_peer(error):
            kind, lost = LostPeerError, f"{_other_ranks()} died, or did not answer for {waited}"
        elif is_lost_worker(error):
            lost = f"a worker of the data loader died; when memory was short, lower {workers}"
        elif is_out_of_memory(error):
            lost = f"out of memory: {smaller}"
        else:
            raise
        said = f"rank {distributed.rank()}: {lost} ({first_line(error)}); {then}"
        raise kind(said) from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process died or does not answer; torch only says so in words."""
    return distributed.world_size() > 1 and isinstance(error, RuntimeError) and any(w in str(error) for w in PEER)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a device, or of the host, of which torch only says so in words."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _other_ranks() -> str:
    """In words; who of several is lost, nobody can tell."""
    rank, others = distributed.rank(), distributed.world_size() - 1
    return f"rank {1 - rank}" if others == 1 else f"one of the {others} other ranks"
