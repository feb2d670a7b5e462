"""Tars behind URLs as if they lay in a local folder: first their index, beside the place where each will be, then they.

What a loader does with them:

    shards = RemoteShards(expand_urls("s3://bucket/dfn/{00000..00139}.tar", cache), cache)
    index = load_index(shards.paths, ...)          # the sidecars are there, the tars need not be
    shards.prefetch([17, 3, 120])                  # what is read next, soonest first: another process fetches it
    descriptor = shards.open(17)                   # waits until it is there; it stays as long as this is open
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_accel.data.cache import ShardCache
from kd_accel.data.fetcher import Fetcher
from kd_accel.data.index import read_sidecar
from kd_accel.data.remote_index import checksums, fetch_sidecars
from kd_accel.data.urls import beside, shown
from kd_accel.schema import ConfigError


class RemoteShards:
    """The tars at `urls`, in their order, through `cache`; number k is `urls[k]`.

    Raises ConfigError when one of them has no index, LocalError when a server does not answer.
    """

    paths: list[Path]  # where each tar is, once it is there; its sidecar is beside it already
    sizes: list[int]  # bytes

    def __init__(self, urls: list[str], cache: ShardCache, *, downloads: int = 4):
        missing = fetch_sidecars(urls, cache)
        if missing:
            raise ConfigError(
                f"data.shards: {len(missing)} of {len(urls)} remote shards have no index, the first is "
                f"{shown(missing[0])}: run kd-accel index {shown(beside(missing[0], ''))}"
            )
        self.urls, self.cache = urls, cache
        self.paths = [cache.place(url) for url in urls]
        self.sizes = [int(read_sidecar(path, "tar_bytes")[0]) for path in self.paths]
        self._sha256 = [checksums(path.parent).get(path.name) for path in self.paths]
        self._fetcher = Fetcher(cache, downloads)

    def require_room(self, shards: int) -> None:
        """Raises ConfigError when the cache cannot hold so many of the largest shards at a time."""
        needed = sum(sorted(self.sizes)[-shards:])
        if needed > self.cache.max_bytes:
            raise ConfigError(
                f"data.cache.max_gib={self.cache.max_bytes / 2**30:g} is too little: {shards} shards that are read or "
                f"fetched at a time have {needed / 2**30:.3g} GiB: raise it, or lower data.shuffle_window or "
                "data.cache.ahead"
            )

    def open(self, shard: int) -> int:
        """A file descriptor of the tar; waits until it is there, and as long as it is open the tar stays there.

        Raises LocalError when the tar cannot be fetched, or is not the one that was indexed.
        """
        return self.cache.open(self.urls[shard], self.sizes[shard], self._sha256[shard])

    def local(self, shard: int) -> Path:
        """The tar's path; waits until it is there. Unlike with `open`, it may go when the cache needs room."""
        return self.cache.fetch(self.urls[shard], self.sizes[shard], self._sha256[shard])

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch these in the background, soonest first, instead of what was still to come; returns at once."""
        self._fetcher.fetch([(self.urls[k], self.sizes[k], self._sha256[k]) for k in shards])
