"""Remote tars give the bytes of local ones: over http and S3, with the index beside them or made here."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque

import fsspec
import numpy as np
import psutil
import pytest
from faulty_server import FaultyServer

from kd_accel.cache_config import CacheConfig
from kd_accel.data import patience, remote
from kd_accel.data.cache import ShardCache, open_cache
from kd_accel.data.index import read_sidecar
from kd_accel.data.order import epoch_order
from kd_accel.data.patience import Patience
from kd_accel.data.read_ahead import shards_by_need
from kd_accel.data.remote_index import expand_urls, index_remote
from kd_accel.data.remote_shards import RemoteShards
from kd_accel.schema import ConfigError, LocalError

SIZES = [3, 2, 4]  # samples per shard


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 2**30, patience=Patience(tries=3, stall_seconds=5))


@pytest.fixture
def server(make_shards, monkeypatch):
    """An indexed folder at URL/d."""
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    with FaultyServer() as server:
        server.files = {f"/d/{path.name}": path.read_bytes() for path in make_shards(SIZES).iterdir()}
        yield server


def contents(shards):
    """All bytes of every tar."""
    read = []
    for k, size in enumerate(shards.sizes):
        descriptor = shards.open(k)
        read.append(os.pread(descriptor, size, 0))
        os.close(descriptor)
    return read


def tars(server):
    return [server.files[f"/d/{k:04d}.tar"] for k in range(len(SIZES))]


def wait_until(true):
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("waited ten seconds")


@pytest.mark.parametrize("entry", ["/d/{0000..0002}.tar", "/d/", "/d"])
def test_over_http(server, cache, entry):
    """Brace ranges, and a folder by its manifest; the tars and their index are those of the server."""
    shards = RemoteShards(expand_urls(server.url + entry, cache), cache)
    assert [len(read_sidecar(path, "keys")[0]) for path in shards.paths] == SIZES
    assert not any(path.exists() for path in shards.paths)  # the index is enough to deal an order
    assert contents(shards) == tars(server)
    assert shards.local(1).read_bytes() == tars(server)[1]


def test_a_second_start_asks_for_the_manifest_alone(server, cache):
    """Sidecars that fit it and tars are there already."""
    urls = expand_urls(f"{server.url}/d/{{0000..0002}}.tar", cache)
    contents(RemoteShards(urls, cache))
    server.requests.clear()
    contents(RemoteShards(urls, cache))
    assert [path for _, path, _ in server.requests] == ["/d/manifest.json"]


def test_shards_that_were_replaced_are_fetched_anew(server, cache, make_shards, write_tar, jpeg, tmp_path):
    """When the manifest no longer fits what is here; the tars go with their old index."""
    urls = expand_urls(f"{server.url}/d", cache)
    contents(RemoteShards(urls, cache))
    make = tmp_path / "new"
    make.mkdir()
    os.rename(tmp_path / "shards", tmp_path / "old")
    for path in make_shards([1, 1, 1]).iterdir():
        server.files[f"/d/{path.name}"] = path.read_bytes()
    assert contents(RemoteShards(urls, cache)) == tars(server)


def test_checksums_of_the_manifest_are_checked(server, cache):
    """A tar that is not what was packed is not trained on."""
    manifest = json.loads(server.files["/d/manifest.json"])
    manifest["shards"][1]["sha256"] = "0" * 64
    server.files["/d/manifest.json"] = json.dumps(manifest).encode()
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.local(0)
    with pytest.raises(LocalError, match=r"0001.tar: given up after 3 tries in a row: .* sha256 is .*, not 0000"):
        shards.local(1)


def test_what_comes_is_fetched_in_the_background(server, cache):
    """Soonest first; a new list takes the place of what was still to come."""
    server.delay = 0.1
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache, downloads=1)
    shards.prefetch([2, 0])
    wait_until(lambda: server.gets("/d/0002.tar"))
    shards.prefetch([1])
    wait_until(shards.paths[1].exists)
    assert shards.paths[2].exists()
    assert server.gets("/d/0000.tar") == []


def test_a_failure_in_the_background_is_met_again_by_the_reader(server, cache, capfd):
    """It costs a line, the next shard is fetched, and the reader tries anew."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache, downloads=1)
    server.faults["/d/0000.tar"] = deque([500] * 3)
    shards.prefetch([0, 1])
    wait_until(shards.paths[1].exists)
    assert "0000.tar: given up after 3 tries" in capfd.readouterr().err
    assert shards.local(0).read_bytes() == tars(server)[0]


def test_a_lost_fetcher_is_started_again(server, cache):
    """Whatever ended it; the reader never depends on it."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.prefetch([0])
    wait_until(shards.paths[0].exists)
    shards._fetcher._process.kill()
    shards._fetcher._process.wait()
    shards.prefetch([1])
    wait_until(shards.paths[1].exists)


def test_the_fetcher_ends_with_its_process(server, cache, tmp_path):
    """Also with one that is killed: it reads the end of its input."""
    code = f"""
import sys, os, signal
from pathlib import Path
from kd_accel.data.cache import ShardCache
from kd_accel.data.fetcher import Fetcher
fetcher = Fetcher(ShardCache(Path({str(cache.folder)!r}), 10**6), 1)
fetcher.fetch([({server.url + "/d/0000.tar"!r}, {len(tars(server)[0])}, None)])
print(fetcher._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    words = [sys.executable, "-c", code]
    pid = int(subprocess.run(words, stdout=subprocess.PIPE, check=False, timeout=60).stdout)
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_forked_workers_neither_end_the_fetcher_nor_keep_it(server, cache):
    """They have a copy of everything: of the object that ends it, and of its open input."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.prefetch([0])
    fetcher = shards._fetcher._process
    ready, done = os.pipe()
    worker = os.fork()
    if worker == 0:
        del shards
        gc.collect()
        os.write(done, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    assert fetcher.poll() is None
    del shards
    gc.collect()
    assert fetcher.poll() is not None
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    os.close(ready)
    os.close(done)


def test_workers_get_a_copy(server, cache):
    """Pickled after it has prefetched, as spawned workers need it."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.prefetch([0])
    copy = pickle.loads(pickle.dumps(shards))
    assert contents(copy) == tars(server)
    copy.prefetch([1])


def test_a_forked_worker_reads(server, cache):
    """While threads of its parent fetch: nothing of fsspec is carried over the fork."""
    server.delay = 0.05
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.prefetch([2, 1])
    worker = os.fork()
    if worker == 0:
        os._exit(0 if contents(shards) == tars(server) else 1)
    assert os.waitpid(worker, 0)[1] == 0


def test_shards_without_index(server, cache):
    """The way out is in the message; indexing fetches each tar once, and training then finds both."""
    for path in [path for path in server.files if not path.endswith(".tar")]:
        del server.files[path]
    entry = f"{server.url}/d/{{0000..0002}}.tar"
    urls = expand_urls(entry, cache)
    with pytest.raises(
        ConfigError, match=rf"3 of 3 remote shards have no index, .*: run kd-accel index {server.url}/d/"
    ):
        RemoteShards(urls, cache)
    assert index_remote(entry, cache) == (3, 3, sum(SIZES))
    assert index_remote(entry, cache) == (0, 3, sum(SIZES))
    assert contents(RemoteShards(urls, cache)) == tars(server)
    assert len(server.gets("/d/0001.tar")) == 1


def test_a_damaged_tar_cannot_be_indexed(server, cache):
    """It is named as it lies on the disk."""
    server.files = {"/d/0.tar": tars(server)[0][:4096]}
    with pytest.raises(ConfigError, match=r"0.tar: not a whole tar, it breaks off after 1 whole samples"):
        index_remote(f"{server.url}/d/0.tar", cache)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"<html>", "not a manifest of kd-accel index"),
        (b'{"shards": [{"name": 1}]}', "not a manifest of kd-accel index"),
        (b'{"shards": [{"file": "../../../etc/0.tar"}]}', "'../../../etc/0.tar' is not the name of a tar beside it"),
        (b'{"shards": [{"file": "0.tar/../1"}]}', "is not the name of a tar"),
    ],
)
def test_a_manifest_is_not_trusted(server, cache, manifest, message):
    """It comes from elsewhere: it names files of its own folder or is refused."""
    server.files["/d/manifest.json"] = manifest
    with pytest.raises(ConfigError, match=f"manifest.json: .*{message}"):
        expand_urls(f"{server.url}/d", cache)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["/none"], "a web server does not list its files"),
        (["/d/{0..1.tar"], "unbalanced braces"),
        (["/d/0.tar", "/d/{0,1}.tar"], "d/0.tar is given twice"),
    ],
)
def test_wrong_urls_are_named(server, cache, entries, message):
    with pytest.raises(ConfigError, match=f"data.shards: .*{message}"):
        expand_urls([server.url + entry for entry in entries], cache)


def test_local_and_remote_do_not_mix(server, cache):
    """In one list; data.sources takes both."""
    with pytest.raises(ConfigError, match="0.tar is local, others are remote"):
        expand_urls([f"{server.url}/d/0000.tar", "data/0.tar"], cache)


def test_a_cache_that_is_too_small_is_named_at_the_start(server, cache):
    """Before the first step, not when it is full."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    cache.max_bytes = sum(shards.sizes)
    shards.require_room(3)
    cache.max_bytes -= 1
    with pytest.raises(ConfigError, match=r"data.cache.max_gib=.* is too little: 3 shards"):
        shards.require_room(3)


@pytest.fixture(scope="module")
def bucket(data_root):
    """The real training shards in a bucket of an S3 server on loopback."""
    moto = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    patch = pytest.MonkeyPatch()
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    fs = fsspec.filesystem("s3")
    fs.mkdir("pairs")
    for path in sorted((data_root / "pairs/val").glob("*.tar")) + sorted(
        (data_root / "pairs/val_unseen").glob("*.tar")
    ):
        fs.put_file(str(path), f"pairs/{path.parent.name}/{path.name}")
    yield "s3://pairs"
    server.stop()
    patch.undo()


def test_over_s3(bucket, cache, data_root):
    """A folder is listed; the real tars come whole, and their index is made here."""
    originals = [data_root / "pairs/val/000000.tar", data_root / "pairs/val_unseen/000000.tar"]
    entries = [f"{bucket}/val", f"{bucket}/val_unseen/{{000000..000000}}.tar"]
    assert expand_urls(entries, cache) == [f"{bucket}/val/000000.tar", f"{bucket}/val_unseen/000000.tar"]
    assert index_remote(entries, cache) == (2, 2, 596 + 485)  # as /data/README.md counts them
    shards = RemoteShards(expand_urls(entries, cache), cache)
    assert contents(shards) == [path.read_bytes() for path in originals]


def test_an_index_in_the_bucket_is_used(bucket, cache, make_shards):
    """Sidecars and manifest beside the tars: nothing but them is fetched before training."""
    folder = make_shards(SIZES)
    fs = fsspec.filesystem("s3")
    fs.put(str(folder), "pairs/indexed", recursive=True)
    shards = RemoteShards(expand_urls(f"{bucket}/indexed", cache), cache)
    assert [len(read_sidecar(path, "keys")[0]) for path in shards.paths] == SIZES
    assert not any(path.exists() for path in shards.paths)
    assert contents(shards) == [(folder / f"{k:04d}.tar").read_bytes() for k in range(3)]


def test_what_a_bucket_lacks_is_one_line(bucket, cache):
    with pytest.raises(LocalError, match=r"s3://pairs/none/0.tar: cannot be fetched: FileNotFoundError"):
        index_remote(f"{bucket}/none/0.tar", cache)
    with pytest.raises(LocalError, match=r"s3://nobucket: cannot be fetched: FileNotFoundError"):
        expand_urls("s3://nobucket", cache)
    with pytest.raises((ConfigError, LocalError), match="s3://pairs/empty"):
        expand_urls(f"{bucket}/empty", cache)


def test_the_hub_is_understood(monkeypatch):
    """hf:// reaches HuggingFace's file system with repository and path; nothing is asked of it here."""
    fs, path = remote._filesystem("hf://datasets/org/name/data/0.tar", Patience())
    assert type(fs).__name__ == "HfFileSystem"
    assert path == "datasets/org/name/data/0.tar"


def test_numbers_of_the_order_are_taken(server, cache):
    """The order hands out numpy's integers."""
    shards = RemoteShards(expand_urls(f"{server.url}/d", cache), cache)
    shards.prefetch(np.array([1, 2]))
    wait_until(shards.paths[2].exists)


def test_what_comes_is_read_off_the_order():
    """Every shard by its first batch, and its last one; a shard that no batch reads is not named."""
    sizes = np.array([7, 3, 12, 1, 9, 8])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    order = epoch_order(sizes, seed=3, epoch=1, window=2, global_batch=5)[:5]
    read = [{int(np.searchsorted(starts, i, side="right")) - 1 for i in batch} for batch in order]
    shards, last = shards_by_need(order, starts)
    assert set(shards.tolist()) == set().union(*read) < set(range(6))
    firsts = [min(k for k, batch in enumerate(read) if shard in batch) for shard in shards]
    assert firsts == sorted(firsts)
    assert last.tolist() == [max(k for k, batch in enumerate(read) if shard in batch) for shard in shards]


def test_the_cache_of_a_config(tmp_path, monkeypatch):
    """GiB to bytes, and ~ to the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cache = open_cache(CacheConfig(max_gib=0.5, tries=3))
    assert (cache.folder, cache.max_bytes) == (tmp_path / ".cache/kd_accel/shards", 2**29)
    assert (cache.patience.tries, cache.patience.stall_seconds) == (3, 60)
