"""Where the time of a step goes: named spans on the device's own clock.

    with Clock(device) as clock:
        with span("teacher"):
            ...
    clock.seconds()  # {"teacher": 0.12, "other": 0.01}

Time inside an inner span is not part of the outer one, so the numbers add up to the whole. On a GPU the marks are
events in its stream: a span is what the device spent, and waiting for the host shows where it idles. Without a running
clock a span costs a comparison.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext

import torch

SPANS = ("data", "transfer", "student", "teacher", "objective", "gather", "backward", "optimizer")
OTHER = "other"  # what no span names

_running: Clock | None = None


def span(name: str) -> AbstractContextManager:
    """Count what happens inside as `name`, while a clock runs."""
    return nullcontext() if _running is None else _Span(_running, name)


class Clock:
    """Runs from `with` to its end; one at a time, in one thread."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # when, and what from then on
        self._open = [OTHER]

    def __enter__(self) -> Clock:
        global _running
        assert _running is None, "a clock runs already"
        _running = self
        self._mark()
        return self

    def __exit__(self, *error) -> None:
        global _running
        self._mark()
        _running = None

    def seconds(self) -> dict[str, float]:
        """By span, in their order; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (start, name), (end, _) in zip(self._marks, self._marks[1:], strict=False):
            passed = start.elapsed_time(end) / 1000 if self._cuda else end - start
            found[name] = found.get(name, 0.0) + passed
        return {name: found[name] for name in (*SPANS, OTHER) if name in found}

    def enter(self, name: str) -> None:
        """From now on the time is that of `name`, until `leave`."""
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        """Back to what was timed before `enter`."""
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((now, self._open[-1]))


class _Span:
    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._clock.enter(self._name)

    def __exit__(self, *error) -> None:
        self._clock.leave()
