"""Files that are there as a whole or not at all, whatever ends the process that writes them. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall be `path`: at the end of the block it is, on the disk, unless the block raised.

    Two processes may replace the same file; the last one wins. A process that is killed leaves .NAME.PID.tmp behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
