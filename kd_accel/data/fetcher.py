"""Fetches shards ahead in a process of its own: downloads in threads of the training process would take its GIL.

The process is told on its standard input what comes next, and ends with whoever started it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_accel.data.cache import ShardCache
from kd_accel.data.patience import Patience
from kd_accel.schema import LocalError

log = logging.getLogger("kd_accel")

NO_ROOM_SECONDS = 1.0  # until readers may have let go of a shard

Wanted = tuple[str, int, str | None]  # url, bytes, sha256


class Fetcher:
    """Fetches into `cache`, `downloads` shards at a time; its process starts with the first request."""

    def __init__(self, cache: ShardCache, downloads: int):
        self._cache, self._downloads = cache, downloads
        self._process: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def fetch(self, wanted: list[Wanted]) -> None:
        """Fetch these, soonest first, instead of what was still to come; returns at once.

        What cannot be fetched costs a line on stderr: whoever needs the shard tries again.
        """
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        try:
            _write_line(self._process, wanted)
        except BrokenPipeError:
            log.warning("the process that fetches shards ahead has ended; the next request starts it again")

    def _start(self) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the training process's; this one ends with it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        cache = self._cache
        settings = {"folder": str(cache.folder), "max_bytes": cache.max_bytes, "patience": asdict(cache.patience)}
        weakref.finalize(self, _end, process, os.getpid())
        _write_line(process, {**settings, "downloads": self._downloads})
        return process


class _Coming(threading.Condition):
    wanted: deque[Wanted] = deque()  # soonest first


def _write_line(process: subprocess.Popen, message: Any) -> None:
    assert process.stdin is not None, "started with a pipe"
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def _end(process: subprocess.Popen, owner: int) -> None:
    """End the process from the one that started it; loader workers, which are forked from that, have a copy of this."""
    if os.getpid() == owner:
        process.kill()  # not by the end of its input alone, which forked workers hold open: a part is gone on from
        assert process.stdin is not None, "started with a pipe"
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def _main() -> None:
    logging.basicConfig(format="%(message)s")
    settings = json.loads(sys.stdin.readline())
    cache = ShardCache(Path(settings["folder"]), settings["max_bytes"], patience=Patience(**settings["patience"]))
    coming = _Coming()
    for _ in range(settings["downloads"]):
        threading.Thread(target=_fetch_what_comes, args=(cache, coming), daemon=True).start()
    for line in sys.stdin:
        with coming:
            coming.wanted = deque(json.loads(line))
            coming.notify_all()


def _fetch_what_comes(cache: ShardCache, coming: _Coming) -> None:
    while True:
        with coming:
            while not coming.wanted:
                coming.wait()
            wanted = coming.wanted
            shard = wanted.popleft()
        try:
            done = cache.fetch_ahead(*shard)
        except LocalError as error:
            log.warning("%s", error)
            continue
        if not done:
            time.sleep(NO_ROOM_SECONDS)
            with coming:
                wanted.appendleft(shard)  # to no purpose if another list has taken its place: that one knows better


if __name__ == "__main__":
    _main()
