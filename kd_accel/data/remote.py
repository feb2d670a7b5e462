"""One remote file (http, https, s3, hf and what else fsspec opens): what there is of it, and fetching it despite cuts.

A download goes on where it was cut, as long as the file is still the same one. Credentials and headers come from
fsspec's own config and the environment.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import aiohttp
import fsspec

from kd_accel.data.patience import Patience, RemoteForbidden, RemoteMissing, persist
from kd_accel.data.urls import shown
from kd_accel.schema import ConfigError, LocalError

log = logging.getLogger("kd_accel")

BLOCK = 16 * 2**20  # bytes of one request: what a cut connection costs, and what a download holds in memory


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file."""

    size: int  # bytes
    version: str | None  # another one with every change of the content: ETag, blob id or time; None: it does not say
    sha256: str | None = None
    md5: str | None = None


def list_folder(url: str, patience: Patience) -> list[str]:
    """URLs of the *.tar directly in a folder of an object store, sorted. Raises LocalError when it cannot be read."""

    def names() -> list[str]:
        fs, path = _filesystem(url, patience)
        return [fs.unstrip_protocol(name) for name in fs.ls(path, detail=False)]

    return sorted(name for name in persist(url, names, patience) if name.endswith(".tar"))


def read_bytes(url: str, patience: Patience) -> bytes | None:
    """The whole content of a small file; None when it is not there."""

    def content() -> bytes:
        fs, path = _filesystem(url, patience)
        return bytes(fs.cat_file(path))

    try:
        return persist(url, content, patience)
    except RemoteMissing:
        return None
    except RemoteForbidden as error:  # also what an object store says of an absent file, to whoever may not list it
        log.warning("%s; taken as absent", error)
        return None


def describe(url: str, patience: Patience) -> RemoteFile:
    """What the server says of the file; raises LocalError when it is not there."""
    return persist(url, lambda: _describe(url, patience), patience)


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

    persist(url, attempt, patience, progress=lambda: part.stat().st_size if part.exists() else 0)


def forget(part: Path) -> None:
    """Drop what has come so far."""
    part.unlink(missing_ok=True)
    part.with_suffix(".version").unlink(missing_ok=True)


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
