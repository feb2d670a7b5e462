"""One remote file (http, https, s3, hf and what else fsspec opens): what there is of it, and fetching it despite cuts.

A download goes on where it was cut, as long as the file is still the same one; it gives up only after `tries` failures
in a row without a new byte. Credentials and headers come from fsspec's own config and the environment.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import fsspec

from kd_accel.schema import ConfigError, LocalError

log = logging.getLogger("kd_accel")

BLOCK = 16 * 2**20  # bytes of one request: what a cut connection costs, and what a download holds in memory
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds before the second try, and at most
_REMOTE = re.compile(r"(https?|s3a?|hf|gs|gcs|az|abfs)://[^/]")
_TEMPORARY = (408, 425, 429)  # HTTP statuses that ask for patience; every other 4xx is an answer
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what no other try will change

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file."""

    size: int  # bytes
    version: str | None  # another one with every change of the content: ETag, blob id or time; None: it does not say
    sha256: str | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Patience:
    """How long a server may fail."""

    tries: int = 8  # in a row without a new byte
    stall_seconds: float = 60.0  # without a byte, until a connection counts as cut


def is_remote(entry: str) -> bool:
    """Whether `entry` is a URL to be fetched, not a path."""
    return _REMOTE.match(entry) is not None


def beside(url: str, name: str) -> str:
    """The URL of the file `name` in the folder of `url`; a query (an access token) is kept."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def file_name(url: str) -> str:
    """The last part of the path."""
    return urlsplit(url).path.rpartition("/")[2]


def shown(url: str) -> str:
    """`url` for people and logs: without password and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def list_folder(url: str, patience: Patience) -> list[str]:
    """URLs of the *.tar directly in a folder of an object store, sorted. Raises LocalError when it cannot be read."""

    def names() -> list[str]:
        fs, path = _filesystem(url, patience)
        return [fs.unstrip_protocol(name) for name in fs.ls(path, detail=False)]

    return sorted(name for name in _persist(url, names, patience) if name.endswith(".tar"))


def read_bytes(url: str, patience: Patience) -> bytes | None:
    """The whole content of a small file; None when it is not there."""

    def content() -> bytes:
        fs, path = _filesystem(url, patience)
        return bytes(fs.cat_file(path))

    try:
        return _persist(url, content, patience)
    except RemoteMissing:
        return None
    except RemoteForbidden as error:  # also what an object store says of an absent file, to whoever may not list it
        log.warning("%s; taken as absent", error)
        return None


def describe(url: str, patience: Patience) -> RemoteFile:
    """What the server says of the file; raises LocalError when it is not there."""
    return _persist(url, lambda: _describe(url, patience), patience)


def download(
    url: str, target: Path, *, part: Path, patience: Patience, size: int | None = None, sha256: str | None = None
) -> None:
    """Put the file at `target`, whole or not at all; `part` holds what has come so far and is gone on from.

    `size` (bytes) and `sha256` are what it must have, where that is known. Raises LocalError when the file is not
    there, is another one than expected, the disk is full, or nothing comes for `patience`.
    """

    def attempt() -> None:
        file = _describe(url, patience)
        if size is not None and file.size != size:
            raise LocalError(
                f"{shown(url)}: has {file.size:,} bytes but had {size:,} when it was indexed, so it was replaced: "
                "index the shards again"
            )
        _continue(url, file, part, patience)
        _check(part, file, sha256)
        if _describe(url, patience) != file:
            forget(part)
            raise OSError("it was changed while it was being fetched")
        os.replace(part, target)
        forget(part)

    _persist(url, attempt, patience, progress=lambda: part.stat().st_size if part.exists() else 0)


def forget(part: Path) -> None:
    """Drop what has come so far."""
    part.unlink(missing_ok=True)
    part.with_suffix(".version").unlink(missing_ok=True)


class RemoteMissing(LocalError):
    """There is no such file."""


class RemoteForbidden(LocalError):
    """It may not be read."""


def _filesystem(url: str, patience: Patience) -> tuple[fsspec.AbstractFileSystem, str]:
    """Made anew for every use: fsspec keeps one per process and thread, and none of them survives a fork."""
    options = {}
    if url.startswith("http"):
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=patience.stall_seconds, sock_read=patience.stall_seconds
        )
        options = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
    elif url.startswith("s3"):
        seconds = {"connect_timeout": patience.stall_seconds, "read_timeout": patience.stall_seconds}
        options = {"config_kwargs": {**seconds, "retries": {"total_max_attempts": 1}}}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(f"{shown(url)}: {error}") from None
    fs.invalidate_cache()
    return fs, path


def _describe(url: str, patience: Patience) -> RemoteFile:
    fs, path = _filesystem(url, patience)
    info = fs.info(path)
    if info.get("size") is None:
        raise LocalError(f"{shown(url)}: the server does not say how large it is")
    version = next(
        (str(info[key]) for key in ("ETag", "blob_id", "Last-Modified", "LastModified") if info.get(key)), None
    )
    sha256 = (info.get("lfs") or {}).get("sha256")
    md5 = base64.b64decode(info["Content-MD5"]).hex() if info.get("Content-MD5") else None
    return RemoteFile(int(info["size"]), version, sha256, md5)


def _continue(url: str, file: RemoteFile, part: Path, patience: Patience) -> None:
    """Fetch what `part` lacks of `file`; all of it when the part is of another version, or the server ignores Range."""
    version = part.with_suffix(".version")
    same = file.version is not None and version.exists() and version.read_text() == file.version
    with part.open("r+b" if part.exists() else "w+b") as local:
        if not same or part.stat().st_size > file.size:
            local.truncate(0)
            version.write_text(file.version or "")
        fs, path = _filesystem(url, patience)
        try:
            with fs.open(path, "rb", block_size=BLOCK, cache_type="none") as remote:
                remote.seek(local.seek(0, os.SEEK_END))
                _copy(remote, local, file.size)
        except ValueError:  # so fsspec says that it cannot seek: the server ignores Range
            local.truncate(0)
            with fs.open(path, "rb", block_size=0) as remote:
                _copy(remote, local, file.size)
        local.flush()
        os.fsync(local.fileno())


def _copy(remote: IO[bytes], local: IO[bytes], size: int) -> None:
    local.seek(0, os.SEEK_END)
    while (here := local.tell()) < size:
        block = remote.read(min(BLOCK, size - here))
        if not block:
            raise EOFError(f"the server ended it after {here:,} of {size:,} bytes")
        local.write(block)
        local.flush()  # the next try goes on from what is on disk


def _check(part: Path, file: RemoteFile, sha256: str | None) -> None:
    """Compare the content with every checksum that somebody gave; a wrong one is fetched again from the start."""
    for name, wanted in (("sha256", sha256), ("sha256", file.sha256), ("md5", file.md5)):
        if wanted is None:
            continue
        with part.open("rb") as local:
            found = hashlib.file_digest(local, name).hexdigest()
        if found != wanted:
            forget(part)
            raise OSError(f"its {name} is {found}, not {wanted}")


def _persist(url: str, attempt: Callable[[], T], patience: Patience, *, progress: Callable[[], int] = int) -> T:
    """`attempt` until it succeeds; waits between tries, twice as long each time, by chance up to that.

    `progress` (bytes so far): whoever gets on, however slowly, is not given up.
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
