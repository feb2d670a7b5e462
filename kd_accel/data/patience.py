"""Asking a server until it answers: what is worth another try, and what is an answer.

It gives up only after `tries` failures in a row without a new byte.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import aiohttp

from kd_accel.data.urls import shown
from kd_accel.schema import ConfigError, LocalError

log = logging.getLogger("kd_accel")

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds before the second try, and at most
_TEMPORARY = (408, 425, 429)  # HTTP statuses that ask for patience; every other 4xx is an answer
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what no other try will change

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a server may fail."""

    tries: int = 8  # in a row without a new byte
    stall_seconds: float = 60.0  # without a byte, until a connection counts as cut


class RemoteMissing(LocalError):
    """There is no such file."""


class RemoteForbidden(LocalError):
    """It may not be read."""


def persist(url: str, attempt: Callable[[], T], patience: Patience, *, progress: Callable[[], int] = int) -> T:
    """`attempt` until it succeeds; waits between tries, twice as long each time, by chance up to that.

    `progress` (bytes so far): whoever gets on, however slowly, is not given up. Raises RemoteMissing, RemoteForbidden
    and other LocalErrors for answers that will not change, and when `patience` is at its end.
    """
    failures, reached = 0, progress()
    while True:
        try:
            return attempt()
        except ConfigError:
            raise
        except Exception as error:  # every library under fsspec has errors of its own
            failures, reached = (failures + 1, reached) if progress() <= reached else (1, progress())
            problem = _in_words(error)
            if _is_answer(error):
                raise _kind(error)(f"{shown(url)}: cannot be fetched: {problem}") from None
            if failures >= patience.tries:
                raise LocalError(f"{shown(url)}: given up after {failures} tries in a row: {problem}") from None
            seconds = _delay(failures, error)
        log.warning("%s: %s; trying again in %.1f s", shown(url), problem, seconds)
        time.sleep(seconds)


def _is_answer(error: Exception) -> bool:
    """Whether trying again is no use."""
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return True
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TEMPORARY
    # fsspec calls every failed question about a http file FileNotFoundError and keeps the reason as its cause
    missing = isinstance(error, FileNotFoundError) and not isinstance(error.__cause__, aiohttp.ClientError | OSError)
    return missing or isinstance(error, PermissionError)


def _kind(error: Exception) -> type[LocalError]:
    status = _status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return RemoteForbidden
    missing = status in (404, 410) if status else isinstance(error, FileNotFoundError)
    return RemoteMissing if missing else LocalError


def _status(error: Exception) -> int | None:
    return next((e.status for e in (error, error.__cause__) if isinstance(e, aiohttp.ClientResponseError)), None)


def _delay(failures: int, error: Exception) -> float:
    """Seconds; at least what the server asks for, in reason."""
    seconds = random.uniform(0, min(FIRST_DELAY * 2**failures, LONGEST_DELAY))
    cause = next((e for e in (error, error.__cause__) if isinstance(e, aiohttp.ClientResponseError)), None)
    asked = cause.headers.get("Retry-After", "") if cause and cause.headers else ""
    return max(seconds, min(float(asked), LONGEST_DELAY)) if asked.isdecimal() else seconds


def _in_words(error: Exception) -> str:
    """One line; of an error that only wraps another one, the other one."""
    inner = error.__cause__ if isinstance(error.__cause__, aiohttp.ClientError | OSError) else error
    status = _status(error)
    words = f"HTTP {status} {getattr(inner, 'message', '')}".strip() if status else f"{type(inner).__name__}: {inner}"
    return " ".join(words.split()).removesuffix(":")
