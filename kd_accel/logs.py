"""Where lines of the logger "kd_accel" go: out.log and the console. A full disk costs lines and rows, never the run."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

LOG = logging.getLogger("kd_accel")
FORMAT = "%(asctime)s | %(levelname)s | %(message)s"


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
