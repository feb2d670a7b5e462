"""Lines on a disk that is full: whole or absent, and never the end of the run."""

from __future__ import annotations

import logging
import resource
from contextlib import contextmanager

import pytest

from kd_accel.logs import LOG, LineFile, start_logging, start_logging_of


@contextmanager
def no_file_above(size: int):
    """Writes beyond `size` bytes of a file fail with OSError, one that crosses the limit is cut off there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_whole_or_absent(tmp_path, caplog):
    """One that fits in part is taken back and said; with room again the file goes on."""
    file = LineFile(tmp_path / "rows")
    with no_file_above(10):
        for line in ("12345", "67890", "x"):
            file.write(line)
    file.write("end")
    file.close()
    assert (tmp_path / "rows").read_text() == "12345\nx\nend\n"
    (said,) = caplog.records
    assert "rows: a row could not be written" in said.getMessage()


def test_a_file_goes_on(tmp_path):
    for line in ("one", "two"):
        file = LineFile(tmp_path / "rows")
        file.write(line)
        file.close()
    assert (tmp_path / "rows").read_text() == "one\ntwo\n"


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
