"""SIGTERM and SIGUSR1, by which schedulers announce an end, become a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Inside `with`, the signals only leave their name in `received`; a second one changes nothing.

    received    None, or the name of the first signal that came
    """

    def __init__(self, *, active: bool = True):
        """Without `active` signals do what they did before."""
        self.received: str | None = None
        self._numbers = STOPPING if active else ()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


def leave_stopping_to_the_parent() -> None:
    """For a loader's worker: signals to the whole group must not end it before the parent has saved."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
