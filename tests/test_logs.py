"""Where the lines of a run go: on a disk that is full, never the end of the run."""

from __future__ import annotations

import logging

import pytest
from full_disk import no_file_above

from kd_accel.logs import LOG, start_logging, start_logging_of


@pytest.fixture
def out_log(tmp_path):
    handlers = start_logging(tmp_path / "out.log", rows_on_console=True)
    yield tmp_path / "out.log"
    for handler in handlers:
        LOG.removeHandler(handler)
        handler.close()


def test_a_full_disk_leaves_the_console(out_log, capsys):
    """No traceback of the logger's own, neither for the line nor when the file is closed."""
    with no_file_above(0):
        LOG.info("still said")
        (file, _) = LOG.handlers[-2:]
        file.close()
    said = capsys.readouterr().err
    assert said.rstrip().endswith("| INFO | still said")
    assert "Error" not in said


def test_other_errors_of_the_logger_are_shown(out_log, capsys):
    (file, _) = LOG.handlers[-2:]
    file.emit(logging.LogRecord("kd_accel", logging.INFO, __file__, 1, "%d", ("no number",), None))
    assert "TypeError" in capsys.readouterr().err


def test_other_ranks_say_who_they_are(capsys):
    """Of what they warn; the rest is the main rank's to say."""
    handler = start_logging_of(3)
    LOG.info("as all ranks")
    LOG.warning("of one alone")
    LOG.removeHandler(handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" | WARNING | rank 3 | of one alone")
