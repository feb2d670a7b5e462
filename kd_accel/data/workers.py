"""Worker processes of loaders: started so that they end with the process that they read for, whatever ends that."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from kd_accel.schema import ConfigError
from kd_accel.signals import stopping_left_to_the_parent


def items_of(dataset: Dataset, *, num_workers: int, sampler: Iterable | None = None) -> Generator[Any]:
    """What `dataset` makes, in order, in `num_workers` processes of one thread each (0: in this one).

    An item that is a ConfigError is raised: torch would bury its one line in the worker's traceback.
    """
    loader = DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=as_it_is,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # torch would draw the workers' seed from the global generator
    )
    with stopping_left_to_the_parent():
        items = iter(loader)  # starts the workers
    try:
        for item in items:
            if isinstance(item, ConfigError):
                raise item
            yield item
    finally:
        # A traceback may hold `items`, and at exit Python waits for workers, which leave SIGTERM to their parent.
        if num_workers:
            items._shutdown_workers()  # type: ignore[attr-defined]  # of the iterator that has workers


def is_lost_worker(error: BaseException) -> bool:
    """Whether a worker's process was ended from outside; torch only says so in words."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def as_it_is(item: Any) -> Any:
    """For collate_fn, where an item is whole as it comes."""
    return item
