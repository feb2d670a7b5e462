"""One remote file: it arrives whole and right, whatever the connection does, or the reason is one line."""

from __future__ import annotations

import hashlib
import logging
from base64 import b64encode
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FaultyServer

from kd_accel.data import patience, remote
from kd_accel.data.patience import Patience, RemoteForbidden, RemoteMissing
from kd_accel.data.remote import download, read_bytes
from kd_accel.data.urls import beside, is_remote, shown
from kd_accel.schema import ConfigError, LocalError

BLOCK = 10_000  # bytes of one request in these tests
CONTENT = np.random.default_rng(0).bytes(35_000)  # four requests
PATIENCE = Patience(tries=3, stall_seconds=0.3)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", BLOCK)
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    with FaultyServer() as server:
        server.files["/d/0.tar"] = CONTENT
        yield server


def fetch(server, folder: Path, **expected) -> bytes:
    target = folder / "0.tar"
    download(f"{server.url}/d/0.tar", target, part=folder / "0.part", patience=PATIENCE, **expected)
    assert [path.name for path in folder.iterdir()] == ["0.tar"]
    return target.read_bytes()


def test_a_file_comes_in_blocks(server, tmp_path):
    """One request per block, so that no more than one block is in memory or lost."""
    assert fetch(server, tmp_path, size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest()) == CONTENT
    assert server.gets("/d/0.tar") == [f"bytes={a}-{min(a + BLOCK, 35_000) - 1}" for a in range(0, 35_000, BLOCK)]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("faults", [["cut"], ["stall", "cut"], [500, 429], [503, "cut"], ["short"], ["changed"]])
def test_faults_cost_time_but_no_byte(server, tmp_path, faults, etags, ranges):
    """Dropped connections, silence, short answers, error pages, a file that is replaced; whatever the server can do."""
    server.ranges, server.etags = ranges, etags
    server.faults["/d/0.tar"] = deque(faults)
    expected = CONTENT[::-1] if "changed" in faults else CONTENT
    sha256 = hashlib.sha256(expected).hexdigest()
    assert fetch(server, tmp_path, sha256=sha256) == expected


def test_a_cut_download_goes_on_where_it_was(server, tmp_path):
    """What is on disk is not fetched a second time."""
    server.faults["/d/0.tar"] = deque([None, None, "cut"])
    assert fetch(server, tmp_path) == CONTENT
    starts = [int(asked[6:].split("-")[0]) for asked in server.gets("/d/0.tar")]
    assert starts == [0, 10_000, 20_000, 20_000, 30_000]


def test_a_later_process_goes_on_too(server, tmp_path):
    """From the part that a killed one has left, if the file still is the same one; else from the start."""
    server.faults["/d/0.tar"] = deque([None, *[500] * PATIENCE.tries])
    with pytest.raises(LocalError, match="given up after 3 tries in a row: HTTP 500"):
        fetch(server, tmp_path)
    assert (tmp_path / "0.part").read_bytes() == CONTENT[:BLOCK]
    server.requests.clear()
    assert fetch(server, tmp_path) == CONTENT
    assert server.gets("/d/0.tar")[0] == "bytes=10000-19999"


@pytest.mark.parametrize("etags", [True, False])
def test_a_part_of_another_file_is_dropped(server, tmp_path, etags):
    """By its ETag; a server that gives none may have replaced the file, so nothing is gone on from."""
    server.etags = etags
    server.faults["/d/0.tar"] = deque([None, *[500] * PATIENCE.tries])
    with pytest.raises(LocalError):
        fetch(server, tmp_path)
    server.files["/d/0.tar"] = CONTENT[::-1]
    assert fetch(server, tmp_path) == CONTENT[::-1]


def test_who_gets_on_is_not_given_up(server, tmp_path):
    """Tries are counted in a row without a new byte: four good blocks with two cuts before each."""
    server.faults["/d/0.tar"] = deque(["cut", "cut", None] * 4)
    assert fetch(server, tmp_path) == CONTENT


@pytest.mark.parametrize("header", ["Content-MD5", None])
def test_a_wrong_checksum_is_fetched_again_and_then_named(server, tmp_path, header):
    """That of the server and that of the manifest."""
    if header:
        server.headers["/d/0.tar"] = {header: b64encode(hashlib.md5(b"other").digest()).decode()}
    with pytest.raises(LocalError, match=r"given up after 3 tries in a row: OSError: its (md5|sha256) is .*, not "):
        fetch(server, tmp_path, sha256=None if header else hashlib.sha256(b"other").hexdigest())
    assert len([asked for asked in server.gets("/d/0.tar") if asked == "bytes=0-9999"]) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "error"), [(404, RemoteMissing), (410, RemoteMissing), (403, RemoteForbidden), (400, LocalError)]
)
def test_an_answer_is_not_asked_for_again(server, tmp_path, status, error):
    """What is not there or not allowed will not be so in a minute."""
    del server.files["/d/0.tar"]
    server.faults["/d/0.tar"] = deque([status])
    with pytest.raises(error, match=f"d/0.tar: cannot be fetched: HTTP {status}") as raised:
        fetch(server, tmp_path)
    assert type(raised.value) is error
    assert len(server.gets("/d/0.tar")) == 1


def test_a_file_of_another_size_was_replaced(server, tmp_path):
    """The index says how large the tar was."""
    with pytest.raises(LocalError, match="has 35,000 bytes but had 34,000 when it was indexed"):
        fetch(server, tmp_path, size=34_000)


def test_nobody_there_is_one_line(tmp_path, monkeypatch, free_port, caplog):
    """After the tries, each of which the log shows."""
    monkeypatch.setattr(patience, "FIRST_DELAY", 0.01)
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError) as error:
        download(f"http://127.0.0.1:{free_port}/0.tar", tmp_path / "0.tar", part=tmp_path / "p", patience=PATIENCE)
    assert "\n" not in str(error.value)
    assert f"127.0.0.1:{free_port}/0.tar: given up after 3 tries in a row: ClientConnectorError" in str(error.value)
    assert len([r for r in caplog.records if "trying again in" in r.message]) == 2


def test_small_files(server):
    """Content, or None where there is none; faults are waited out."""
    server.files["/d/manifest.json"] = b"{}"
    server.faults["/d/manifest.json"] = deque([500, "cut"])
    assert read_bytes(f"{server.url}/d/manifest.json", PATIENCE) == b"{}"
    assert read_bytes(f"{server.url}/d/nothing.json", PATIENCE) is None


def test_what_may_not_be_seen_counts_as_absent(server, caplog):
    """Object stores say 403 of what is not there, to whoever may not list; the log says so."""
    server.faults["/d/manifest.json"] = deque([403])
    with caplog.at_level(logging.WARNING):
        assert read_bytes(f"{server.url}/d/manifest.json", PATIENCE) is None
    assert "manifest.json: cannot be fetched: HTTP 403 Forbidden; taken as absent" in caplog.text


def test_urls():
    """What is remote, its neighbours, and how it is shown: secrets stay out of logs."""
    assert is_remote("https://host/0.tar")
    assert is_remote("s3://bucket/{0..3}.tar")
    assert is_remote("hf://datasets/org/name/0.tar")
    for local in ["data/0.tar", "/data/0.tar", "file:///etc/passwd", "pipe:cat 0.tar", "simplecache::http://h/0.tar"]:
        assert not is_remote(local)
    url = "https://user:word@host/d/0.tar?token=secret"
    assert beside(url, "manifest.json") == "https://user:word@host/d/manifest.json?token=secret"
    assert shown(url) == "https://host/d/0.tar"
