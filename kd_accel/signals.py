"""SIGTERM and SIGUSR1, by which schedulers announce an end, become a wish that the loop reads between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)
INTERRUPTING = (*STOPPING, signal.SIGINT)  # Ctrl-C with them


class StopSignals:
    """Inside `with`, the signals only leave their name in `received`; a second one changes nothing.

    After one they stay without effect behind the `with` too: schedulers repeat themselves, and what stops has saved.

    received    None, or the name of the first signal that came
    """

    def __init__(self, numbers: tuple[signal.Signals, ...] = STOPPING, *, active: bool = True):
        """Without `active` signals do what they did before."""
        self.received: str | None = None
        self._numbers = numbers if active else ()

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.received else handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name


@contextmanager
def stopping_left_to_the_parent() -> Iterator[None]:
    """Processes started inside never see the signals, the parent misses none.

    Sent to the whole group, they must not end a loader's worker before the parent has saved.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
