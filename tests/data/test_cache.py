"""The cache of remote shards: fetched once per machine, least recently used out first, none that is being read."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from faulty_server import FaultyServer

from kd_accel.data.cache import ShardCache
from kd_accel.data.patience import Patience
from kd_accel.schema import LocalError

SIZE = 1000  # bytes of a shard here
FETCH = """
import sys
from pathlib import Path
from kd_accel.data.cache import ShardCache
ShardCache(Path(sys.argv[1]), 10**6).fetch(sys.argv[2], int(sys.argv[3]))
"""


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files = {f"/d/{k}.tar": bytes([k]) * SIZE for k in range(9)}
        yield server


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 3 * SIZE, patience=Patience(tries=2, stall_seconds=5))


def url(server, k):
    return f"{server.url}/d/{k}.tar"


def held(cache):
    return sorted(path.name for path in cache.folder.glob("*/*.tar"))


def fetch_in_another_process(cache, url, size=SIZE):
    return subprocess.Popen([sys.executable, "-c", FETCH, str(cache.folder), url, str(size)])


def test_the_least_recently_used_goes_first(server, cache):
    """By bytes: with room for three, the fourth takes the place of the one that was not used again."""
    for k in [0, 1, 2, 0, 3]:
        assert cache.fetch(url(server, k), SIZE).read_bytes() == bytes([k]) * SIZE
    assert held(cache) == ["0.tar", "2.tar", "3.tar"]
    assert len(server.gets("/d/0.tar")) == 1


def test_what_is_open_stays(server, cache):
    """Until it is closed."""
    reader = cache.open(url(server, 0), SIZE)
    for k in [1, 2, 3, 4]:
        cache.fetch(url(server, k), SIZE)
    assert held(cache) == ["0.tar", "3.tar", "4.tar"]
    assert os.pread(reader, SIZE, 0) == bytes(SIZE)
    os.close(reader)
    for k in [5, 6, 7]:
        cache.fetch(url(server, k), SIZE)
    assert held(cache) == ["5.tar", "6.tar", "7.tar"]


def test_only_a_reader_goes_over_the_limit(server, cache, caplog):
    """Fetching ahead waits for room; who needs the shard now gets it, and the log says what it cost."""
    readers = [cache.open(url(server, k), SIZE) for k in range(3)]
    assert not cache.fetch_ahead(url(server, 3), SIZE)
    assert held(cache) == ["0.tar", "1.tar", "2.tar"]
    with caplog.at_level(logging.WARNING):
        assert cache.fetch(url(server, 3), SIZE).exists()
    assert "all shards are in use, 1,000 bytes over its limit" in caplog.text
    for reader in readers:
        os.close(reader)
    assert cache.fetch_ahead(url(server, 4), SIZE)
    assert held(cache) == ["2.tar", "3.tar", "4.tar"]


def test_a_shard_is_fetched_once_per_machine(server, cache):
    """Two processes and four threads that want it at the same time."""
    server.delay = 0.3
    others = [fetch_in_another_process(cache, url(server, 0)) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: cache.fetch(url(server, 0), SIZE), range(4)))
    assert [process.wait(60) for process in others] == [0, 0]
    assert len(paths) == 1
    assert len(server.gets("/d/0.tar")) == 1


def test_fetching_ahead_leaves_a_shard_to_whoever_is_at_it(server, cache):
    """Several processes with the same list share the work."""
    server.faults["/d/0.tar"] = deque(["stall"])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.fetch, url(server, 0), SIZE)
        while not server.gets("/d/0.tar"):
            time.sleep(0.01)
        assert cache.fetch_ahead(url(server, 0), SIZE)
        assert not first.done()
        server.closing.set()
        first.result(30)


def test_a_killed_download_is_taken_over(server, cache):
    """Its lock is gone with it, its room is not taken twice, and what it had is gone on from."""
    size = 40 * 2**20
    server.files["/d/0.tar"] = bytes(size)
    server.faults["/d/0.tar"] = deque([None, None, "stall"])
    process = fetch_in_another_process(cache, url(server, 0), size)
    while len(server.gets("/d/0.tar")) < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.requests.clear()
    cache.max_bytes = size
    assert cache.fetch(url(server, 0), size).stat().st_size == size
    assert server.gets("/d/0.tar")[0].startswith(f"bytes={2 * 16 * 2**20}-")


def test_the_part_of_a_killed_download_makes_room_too(server, cache):
    """It counts with all its bytes while it is there; one that is being fetched is never removed."""
    server.files["/d/3.tar"] = bytes(3 * SIZE)
    cache.fetch(url(server, 0), SIZE)
    part = cache.place(url(server, 2)).with_name(f".2.tar.{SIZE}.part")
    part.write_bytes(b"some")
    os.utime(part, ns=(0, 0))
    with cache._lock(cache.place(url(server, 2))):
        assert not cache.fetch_ahead(url(server, 3), 3 * SIZE)
        assert part.exists()
    assert cache.fetch_ahead(url(server, 3), 3 * SIZE)
    assert not part.exists()


def test_a_tar_of_another_size_is_fetched_again(server, cache):
    """The index was renewed, so the tar was."""
    cache.fetch(url(server, 0), SIZE)
    server.files["/d/0.tar"] = b"new" * SIZE
    assert cache.fetch(url(server, 0), 3 * SIZE).read_bytes() == b"new" * SIZE


def test_no_room_on_the_disk_is_one_line(server, cache):
    """And not eight tries."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes; a full disk that needs no mount
    try:
        with pytest.raises(LocalError, match="0.tar: cannot be fetched: OSError: .*File too large"):
            cache.fetch(url(server, 0), SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.gets("/d/0.tar")) == 1


def test_folders_do_not_mix(server, cache):
    """Tars of one name from two folders, or two servers, have places of their own; one folder's tars share one."""
    names = ["http://a/d/0.tar", "http://a/e/d/0.tar", "http://b/d/0.tar", "s3://a/d/0.tar"]
    assert len({cache.place(name) for name in names}) == 4
    assert cache.place("http://a/d/1.tar?token=x").parent != cache.place("http://a/d/1.tar").parent
    assert cache.place("http://a/d/0.tar").parent == cache.place("http://a/d/1.tar").parent
    assert cache.place("http://a/../../etc/0.tar").parent.parent == cache.folder
