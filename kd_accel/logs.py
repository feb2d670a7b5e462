"""Where lines of the logger "kd_accel" go: out.log and the console. A full disk costs lines and rows, never the run."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

LOG = logging.getLogger("kd_accel")
FORMAT = "%(asctime)s | %(levelname)s | %(message)s"


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
            LOG.error("%s: a row could not be written (%s)", self.path, error)

    def close(self) -> None:
        self._file.close()


class _LogFile(logging.FileHandler):
    """out.log; what a full disk does not take, the console has said."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Console(logging.Handler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def start_logging_of(rank: int) -> logging.Handler:
    """Send the warnings of a rank other than the main one to the console, each with its number."""
    console = _Console(logging.WARNING)
    console.setFormatter(logging.Formatter(FORMAT.replace("%(message)s", f"rank {rank} | %(message)s")))
    LOG.addHandler(console)
    return console


def start_logging(path: Path, *, rows_on_console: bool) -> list[logging.Handler]:
    """Send the logger "kd_accel" to `path` and to the console; rows go there only where no progress bar shows them."""
    console = _Console()
    console.addFilter(lambda record: rows_on_console or not getattr(record, "is_row", False))
    handlers = [_LogFile(path, encoding="utf-8"), console]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    return handlers
