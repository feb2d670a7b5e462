"""A file is the old one or the new one, whatever ends the block that writes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing


def test_the_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "rows.txt"
    replace_text(path, "old")
    replace_text(path, "n\u00e9w\n")
    assert path.read_bytes() == "n\u00e9w\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="a full disk"):
        _fail_half_way(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("old")
    code = f"""
import os, signal
from pathlib import Path
import kd_accel.whole_files
with kd_accel.whole_files.replacing(Path({str(path)!r})) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    assert ended.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "rows.txt"):
        pass
    assert os.listdir(tmp_path) == []


def _fail_half_way(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("a full disk")
