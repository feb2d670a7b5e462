"""Files on a disk that is full, or of a run that was killed: whole lines or none."""

from __future__ import annotations

import pytest
from full_disk import no_file_above

from kd_accel.schema import ConfigError
from kd_accel.text_files import LineFile, read_rows


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


def test_a_damaged_line_names_file_and_line(tmp_path):
    """Only the last line may be torn; anything else is reported with its place."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2"):
        read_rows(tmp_path / "metrics.jsonl")
