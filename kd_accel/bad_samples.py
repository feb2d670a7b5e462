"""Unreadable samples of all ranks: listed, counted, and too many of them end the run."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from pathlib import Path

from kd_accel import distributed
from kd_accel.data.loader import TrainLoader
from kd_accel.schema import ConfigError
from kd_accel.text_files import LineFile

log = logging.getLogger("kd_accel")

MIN_SAMPLES_TO_JUDGE = 10_000  # or one epoch: before that a few bad samples say nothing of the share


def count_bad_samples(loader: TrainLoader, path: Path, *, before: int, samples: int, max_fraction: float) -> int:
    """Add the samples that any rank's loader replaced since the last call to the list at `path`; collective.

    Returns how many they are in all, `before` of them from earlier calls. Raises ConfigError, on every rank, when that
    is more than `max_fraction` of the `samples` that the run has seen.
    """
    records = [record for ranks in distributed.gather_objects(loader.take_bad()) for record in ranks]
    if not records:
        return before
    total = before + len(records)
    last = records[-1]
    if distributed.is_main():
        with closing(LineFile(path)) as file:
            for record in records:
                file.write(json.dumps(record))
        log.warning("%d unreadable samples replaced so far, the last: %s", total, last)
    judged = max(samples, min(loader.steps_per_epoch * loader.global_batch, MIN_SAMPLES_TO_JUDGE))
    if total > max_fraction * judged:
        raise ConfigError(
            f"data.max_bad_fraction={max_fraction} allows fewer than the {total} unreadable samples so far; the last:"
            f" {last['shard']}, sample {last['key']}: {last['reason']}; all of them: {path}"
        )
    return total
