"""Text files that a kill or a full disk leaves whole: replaced at once, or grown by whole lines; rows of JSON."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from kd_accel.schema import ConfigError
from kd_accel.whole_files import replacing

log = logging.getLogger("kd_accel")


class LineFile:
    """A file that grows by whole lines: each is there at once and entirely, or not at all."""

    def __init__(self, path: Path):
        """Go on behind what is there."""
        self.path = path
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Add `line`, which has no end of its own; where the disk takes no more, the console says so instead."""
        data, size = f"{line}\n".encode(), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(size)
            log.error("%s: a row could not be written (%s)", self.path, error)

    def close(self) -> None:
        """No more lines come."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, oldest first; a last line that was cut off while being written is left out.

    Raises ConfigError for any other line that is not a JSON object.
    """
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")  # whole lines end in \n, so the last element is "" or torn
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object; repair or delete this line")
        rows.append(row)
    return rows


def replace_text(path: Path, text: str) -> None:
    """Write `path` so that a reader, or a crash, sees the old text or the new one and nothing between."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(row: dict[str, Any]) -> str:
    """A row as one line of strict JSON: NaN and infinity, which JSON lacks, become null."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
