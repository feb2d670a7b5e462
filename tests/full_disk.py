"""A disk that takes no more, without a mount."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def no_file_above(size: int):
    """Writes beyond `size` bytes of a file fail with OSError, one that crosses the limit is cut off there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
