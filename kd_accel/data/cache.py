"""Remote shards on the local disk: every shard is fetched once per machine, and the least recently used one goes first.

All processes of a machine share the folder. A download holds `.NAME.lock`; an open shard is locked by whoever reads it
(flock, shared), and only shards that nobody has open are removed. A killed process leaves no lock behind. Local disks
only: flock on network file systems is another matter. Sidecars and manifests stay, and do not count.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from kd_accel.cache_config import CacheConfig
from kd_accel.data.patience import Patience
from kd_accel.data.remote import download, forget
from kd_accel.data.urls import beside, file_name

log = logging.getLogger("kd_accel")


class ShardCache:
    """At most `max_bytes` of tars below `folder`, except while readers hold more than that."""

    def __init__(self, folder: Path, max_bytes: int, *, patience: Patience | None = None):
        self.folder, self.max_bytes, self.patience = Path(folder), max_bytes, patience or Patience()

    def place(self, url: str) -> Path:
        """Where the file of `url` is, once it is there; files of one remote folder are in one folder."""
        parent = beside(url, "")
        name = re.sub(r"[^\w.-]", "_", urlsplit(parent).path.strip("/").rpartition("/")[2] or urlsplit(url).netloc)
        return self.folder / f"{name}-{hashlib.sha256(parent.encode()).hexdigest()[:12]}" / file_name(url)

    def open(self, url: str, size: int, sha256: str | None = None) -> int:
        """A file descriptor of the tar, fetched now if it must be; as long as it is open, the tar stays.

        `size` in bytes. Raises LocalError when the tar cannot be had.
        """
        while True:
            path = self.fetch(url, size, sha256)
            with suppress(FileNotFoundError):  # removed between the two lines: fetch it again
                descriptor = os.open(path, os.O_RDONLY)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.fstat(descriptor).st_nlink:
                    return descriptor
                os.close(descriptor)

    def fetch(self, url: str, size: int, sha256: str | None = None) -> Path:
        """The tar's place, once it is there; waits for another process that fetches it. Raises as `open`."""
        path = self.place(url)
        if not _is_there(path, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(path):
                self._download(url, path, size, sha256, at_any_price=True)
        return path

    def fetch_ahead(self, url: str, size: int, sha256: str | None = None) -> bool:
        """As `fetch`, for later: a tar that somebody is fetching is left to them; False: there is no room now."""
        path = self.place(url)
        if _is_there(path, size):
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._lock(path, blocking=False):
                return self._download(url, path, size, sha256, at_any_price=False)
        except Timeout:
            return True

    def _lock(self, path: Path, *, blocking: bool = True) -> FileLock:
        return FileLock(path.with_name(f".{path.name}.lock"), blocking=blocking)

    def _download(self, url: str, path: Path, size: int, sha256: str | None, *, at_any_price: bool) -> bool:
        if _is_there(path, size):  # by whoever held the lock before
            return True
        part = path.with_name(f".{path.name}.{size}.part")
        for other in set(path.parent.glob(f".{escape(path.name)}.*.part")) - {part}:  # of a tar that was replaced
            forget(other)
        if missing := self._reserve(part, size):
            if not at_any_price:
                return False
            log.warning("%s: all shards are in use, %s bytes over its limit", self.folder, f"{missing:,}")
        download(url, path, part=part, patience=self.patience, size=size, sha256=sha256)
        return True

    def _reserve(self, part: Path, size: int) -> int:
        """Make room for `size` bytes and mark it as taken by `part`; the bytes that are missing, 0 when it is done."""
        with FileLock(self.folder / ".room.lock"):
            used = [(last_use, path, n) for last_use, path, n in self._used() if path != part]
            free = self.max_bytes - sum(n for *_, n in used)
            for _, path, n in sorted(used):
                if free >= size:
                    break
                free += n if self._remove(path) else 0
            if free >= size:
                part.touch()
            return max(size - free, 0)

    def _used(self) -> list[tuple[int, Path, int]]:
        """(last use, path, bytes) of every tar, and of every part the bytes that it will come to."""
        found = []
        for path in [*self.folder.glob("*/*.tar"), *self.folder.glob("*/.*.part")]:
            with suppress(FileNotFoundError):  # a part that has just become a tar
                status = path.stat()
                size = int(path.name.split(".")[-2]) if path.suffix == ".part" else status.st_size
                found.append((status.st_atime_ns, path, size))
        return found

    def _remove(self, path: Path) -> bool:
        """Remove a tar that nobody has open, or a part that nobody is fetching; False: it is in use."""
        if path.suffix == ".part":
            tar = path.with_name(".".join(path.name.split(".")[1:-2]))
            with suppress(Timeout), self._lock(tar, blocking=False):
                forget(path)
                return True
            return False
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            path.unlink()
            return True


def open_cache(config: CacheConfig) -> ShardCache:
    """The cache that `config` describes; its folder is made when the first file comes."""
    patience = Patience(tries=config.tries, stall_seconds=config.stall_seconds)
    return ShardCache(Path(config.folder).expanduser(), int(config.max_gib * 2**30), patience=patience)


def _is_there(path: Path, size: int) -> bool:
    """Whether the tar is there as it was indexed; if so, it now is the most recently used."""
    with suppress(FileNotFoundError):
        status = path.stat()
        if status.st_size == size:
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # whether or not the disk is mounted noatime
            return True
    return False
