"""SIGTERM and SIGUSR1 as a wish: noted, repeated in vain, kept from processes that are started meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kd_accel.signals import STOPPING, StopSignals, stopping_left_to_the_parent

pytestmark = pytest.mark.usefixtures("own_handlers")

SHOW_BLOCKED = "import signal; print(sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"


def test_the_first_signal_is_noted_and_later_ones_change_nothing():
    """Also behind the `with`, where a run that has saved comes to its end."""
    with StopSignals() as signals:
        assert signals.received is None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert signals.received == "SIGUSR1"
    for number in STOPPING:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("active", [True, False])
def test_without_a_signal_handlers_are_what_they_were(active):
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    with StopSignals(active=active) as signals:
        if not active:
            os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM] * (1 if active else 2)


def test_a_started_process_sees_none_and_the_parent_misses_none():
    with StopSignals() as signals:
        with stopping_left_to_the_parent():
            os.kill(os.getpid(), signal.SIGTERM)
            said = subprocess.run([sys.executable, "-c", SHOW_BLOCKED], capture_output=True, text=True, check=True)
        assert signals.received == "SIGTERM"
    assert said.stdout.strip() == str(sorted(int(number) for number in STOPPING))
