"""kd-accel eval RUN watch=true: the checkpoints of a run as they appear, oldest first, until the run is done.

What is finished already is known from results.jsonl alone, so that a watcher may be stopped and started at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kd_accel import distributed
from kd_accel.checkpoint import published, read_progress, step_of
from kd_accel.models.release_folder import CONFIG
from kd_accel.schema import ConfigError
from kd_accel.signals import INTERRUPTING, StopSignals

Evaluate = Callable[[Path], Iterator[dict[str, Any]]]


def watch(run: Path, evaluate: Evaluate, *, interval_s: float, until_step: int | None = None) -> None:
    """Evaluate the checkpoints of `run`, which may not exist yet; collective.

    `evaluate` (a checkpoint -> rows, one per task, as they are finished) passes over what is finished, and raises
    ConfigError on every rank or on none. Ends after the run's last step or `until_step`, and between two tasks after
    Ctrl-C, SIGTERM or SIGUSR1. Raises ConfigError at the end for checkpoints that could not be evaluated.
    """
    if (run / CONFIG).exists() or (run / "student").exists():
        raise ConfigError(f"watch=true: {run} is one model; give the directory of the run that makes checkpoints")
    failed: list[str] = []
    with StopSignals(INTERRUPTING) as signals:
        for checkpoint in _appearing(run, signals, interval_s, until_step):
            failed += _evaluate(checkpoint, evaluate, signals)
        if _is_stopped(signals):
            _say(f"stopped by {signals.received or 'a signal to another rank'}; started again, it goes on from there")
            return
    if failed:
        raise ConfigError("\n".join(failed))


def _appearing(run: Path, signals: StopSignals, interval_s: float, until_step: int | None) -> Iterator[Path]:
    """Whole checkpoints, one that is written anew once more, until there is no later one to come or a signal comes."""
    known: dict[Path, str] = {}  # on rank 0
    waiting = False
    while not _is_stopped(signals):
        checkpoint, ended = distributed.from_main(_next(run, known, until_step) if distributed.is_main() else None)
        if checkpoint is not None:
            yield checkpoint
        elif ended:
            return
        else:
            if not waiting:
                _say(f"waiting for the next checkpoint of {run}; looking every {interval_s:g} s")
            _wait(interval_s, signals)
        waiting = checkpoint is None


def _next(run: Path, known: dict[Path, str], until_step: int | None) -> tuple[Path | None, bool]:
    """(the oldest checkpoint that is not known as it is now, whether no later one is to come); known from now on."""
    found = published(run)
    newest = max(found, key=step_of, default=None)
    ended = newest is not None and (_is_last(newest) or (until_step is not None and step_of(newest) >= until_step))
    for checkpoint, mark in found.items():
        wanted = until_step is None or step_of(checkpoint) <= until_step
        if wanted and known.get(checkpoint) != mark:
            known[checkpoint] = mark
            return checkpoint, ended
    return None, ended


def _is_last(checkpoint: Path) -> bool:
    try:
        progress = read_progress(checkpoint)
    except ConfigError:  # dropped meanwhile, for a later one
        return False
    return progress.step == progress.total_steps


def _evaluate(checkpoint: Path, evaluate: Evaluate, signals: StopSignals) -> list[str]:
    """What went wrong, in a line; a signal to any rank ends it between two tasks."""
    try:
        for _ in evaluate(checkpoint):
            if _is_stopped(signals):
                break
    except ConfigError as error:
        if distributed.from_main(checkpoint.exists()):
            _say(f"error: {checkpoint}: {error}")
            return [f"{checkpoint}: {error}"]
        _say(f"{checkpoint} was dropped before it was evaluated (save.keep_last, save.keep_every)")
    return []


def _wait(seconds: float, signals: StopSignals) -> None:
    end = time.monotonic() + seconds
    while signals.received is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))


def _is_stopped(signals: StopSignals) -> bool:
    return distributed.any_rank([signals.received is not None])[0]


def _say(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)
