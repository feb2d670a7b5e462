"""A failure inside a run of the demo is told in a line."""

from __future__ import annotations

import sys

import pytest

from kd_accel.demo import runs
from kd_accel.schema import ConfigError


def test_a_failed_run_is_told_in_its_own_words(tmp_path):
    """The error line of the run is the message, not the launcher's summary; the log keeps everything."""
    script = (
        "import sys; print('loading'); print('error: data.shards: no such folder', file=sys.stderr);"
        "print('E1121 torch/distributed/elastic/multiprocessing/api.py:1002] failed'); sys.exit(2)"
    )
    log = tmp_path / "logs" / "student.log"
    with pytest.raises(ConfigError) as failure:
        runs._launch([sys.executable, "-c", script], log=log)
    first, last = str(failure.value).splitlines()
    assert first == "data.shards: no such folder"
    assert "exit code 2" in last
    assert str(log) in last
    assert "loading" in log.read_text()


def test_a_crash_shows_its_traceback(tmp_path):
    """Without an error line of ours the end of the output is shown, up to the launcher's summary."""
    script = "print('elsewhere'); raise RuntimeError('gloo went away')"
    with pytest.raises(ConfigError, match="RuntimeError: gloo went away"):
        runs._launch([sys.executable, "-c", script], log=tmp_path / "log")
