"""What is said when a process of an evaluation is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kd_accel import distributed
from kd_accel.data.workers import is_lost_worker
from kd_accel.schema import LocalError, LostPeerError


@contextmanager
def told_in_one_line(timeout_s: float) -> Iterator[None]:
    """Inside, the end of another rank, or of a worker of the data loader, raises LocalError.

    `timeout_s` is the process group's: what a rank that hangs is waited for.
    """
    try:
        yield
    except RuntimeError as error:
        if distributed.is_lost_peer(error):
            kind, lost = LostPeerError, f"another process died, or did not answer for {timeout_s:g} s"
        elif is_lost_worker(error):
            kind, lost = LocalError, "a worker of the data loader died; when memory was short, lower num_workers"
        else:
            raise
        reason = str(error).partition("\n")[0].strip()
        raise kind(f"rank {distributed.rank()}: {lost} ({reason}); the rows that are written stay") from error
