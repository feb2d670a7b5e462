"""kd-accel download: shards of what the list names and servers give; nothing else is fetched, and nothing twice."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import time
from collections import Counter, deque

import aiohttp
import numpy as np
import pytest
from faulty_server import FaultyServer
from PIL import Image

from kd_accel.data.index import read_sidecar
from kd_accel.download import verb as download
from kd_accel.download.verb import run
from kd_accel.download.web import Web, is_public
from kd_accel.download_config import DownloadConfig
from kd_accel.schema import ConfigError


def picture(k: int, size=(40, 30), kind="JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files = {f"/{k}.jpg": picture(k) for k in range(5)}
        yield server


@pytest.fixture
def configure(tmp_path):
    """A config for a list of these lines."""

    def make(lines, name="list.tsv", **keys):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        common = {"out": str(tmp_path / "out"), "allow_private": True, "timeout": 5}
        return DownloadConfig(urls=str(tmp_path / name), **{**common, **keys})

    return make


def samples(out) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, over all tars in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def failures(out) -> list[dict]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


def test_a_list_becomes_indexed_shards(server, configure, tmp_path, capsys):
    """Images as they came, captions and facts beside them, in the order of the list, with an index."""
    run(configure([f"caption {k}\t{server.url}/{k}.jpg" for k in range(5)], rows_per_shard=2))
    found = samples(tmp_path / "out")
    assert list(found) == [f"{k:09d}" for k in range(5)]
    assert [sample["jpg"] for sample in found.values()] == [server.files[f"/{k}.jpg"] for k in range(5)]
    assert [sample["txt"].decode() for sample in found.values()] == [f"caption {k}" for k in range(5)]
    facts = json.loads(found["000000003"]["json"])
    assert (facts["url"], facts["width"], facts["height"]) == (f"{server.url}/3.jpg", 40, 30)
    assert [len(read_sidecar(tmp_path / "out" / f"{k:05d}.tar", "keys")[0]) for k in range(3)] == [2, 2, 1]
    assert capsys.readouterr().out == "5 images of 5 rows (100.0%).\n"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("cc3m.tsv", ['a "quoted caption\tURL/0.jpg', "another\tURL/1.jpg"]),
        ("cc12m.tsv", ['URL/0.jpg\ta "quoted caption', "URL/1.jpg\tanother"]),
        ("named.csv", ["id,caption,url", '7,"a ""quoted caption",URL/0.jpg', "8,another,URL/1.jpg"]),
        ("plain.txt", ["URL/0.jpg", "", "URL/1.jpg"]),
    ],
)
def test_kinds_of_lists(server, configure, tmp_path, name, lines):
    """CC3M, CC12M, columns with names, and bare URLs."""
    run(configure([line.replace("URL", server.url) for line in lines], name))
    found = list(samples(tmp_path / "out").values())
    assert [sample["jpg"] for sample in found] == [server.files["/0.jpg"], server.files["/1.jpg"]]
    captions = [sample["txt"].decode() for sample in found if "txt" in sample]
    assert captions == ([] if name == "plain.txt" else ['a "quoted caption', "another"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\tb", "c\td"], "must be one URL, or a URL and a caption"),
        (["http://a/0.jpg\tb\tc"], "must be one URL, or a URL and a caption"),
        (["", ""], "holds no row"),
    ],
)
def test_other_lists_are_refused(configure, lines, message):
    with pytest.raises(ConfigError, match=rf"list.tsv: .*{message}"):
        run(configure(lines))


def test_a_list_that_is_not_there_or_no_text(configure, tmp_path):
    with pytest.raises(ConfigError, match="none.tsv: no such file"):
        run(DownloadConfig(urls=str(tmp_path / "none.tsv"), out=str(tmp_path / "out")))
    config = configure([])
    (tmp_path / "list.tsv").write_bytes(b"caf\xe9\thttp://a\n")
    with pytest.raises(ConfigError, match="list.tsv: cannot be read: 'utf-8' codec"):
        run(config)


def test_every_failure_has_its_kind(server, configure, tmp_path, capsys):
    """In failures.jsonl with row, URL and reason, and counted at the end; the others are there."""
    server.files |= {"/page.jpg": b"<html>", "/cut.jpg": picture(7)[:-300], "/large.jpg": picture(8, (400, 400), "BMP")}
    server.headers["/1.jpg"] = {"X-Robots-Tag": "noai, noindex"}
    server.redirects = {"/moved": f"{server.url}/2.jpg", "/loop": f"{server.url}/loop", "/out": "file:///etc/passwd"}
    server.faults = {"/3.jpg": deque([403]), "/4.jpg": deque(["stall"])}
    paths = "0.jpg none.jpg page.jpg cut.jpg large.jpg 1.jpg moved loop out 3.jpg 4.jpg".split()
    urls = [f"{server.url}/{path}" for path in paths] + ["ftp://a/0.jpg", "/etc/passwd", "http://[", "http://"]
    run(configure(urls, "list.txt", max_bytes=300_000, timeout=0.5, tries=1))
    kinds = ["HTTP 404", "no image", "no image", "too large", "not for training", "too many redirects", "no URL"]
    kinds += ["HTTP 403", "timeout", "no URL", "no URL", "no URL", "no URL"]
    assert [record["kind"] for record in failures(tmp_path / "out")] == kinds
    assert list(samples(tmp_path / "out")) == ["000000000", "000000006"]
    assert failures(tmp_path / "out")[0] == {
        "shard": "00000",
        "key": "000000001",
        "url": f"{server.url}/none.jpg",
        "kind": "HTTP 404",
        "reason": "Not Found",
    }
    output = capsys.readouterr().out
    assert output.startswith("2 images of 15 rows (13.3%).\n")
    for kind, count in Counter(kinds).items():
        assert f"{count:>9,}  {kind}\n" in output


def test_faults_are_tried_again(server, configure, tmp_path):
    """A dropped connection and a server that asks for patience; what is not there is asked for once."""
    server.faults = {"/0.jpg": deque(["cut"]), "/1.jpg": deque([429]), "/2.jpg": deque([503])}
    run(configure([f"{server.url}/{k}.jpg" for k in (0, 1, 2, 9)], "list.txt"))
    assert len(samples(tmp_path / "out")) == 3
    assert [len(server.gets(f"/{k}.jpg")) for k in (0, 1, 2, 9)] == [2, 2, 2, 1]


def test_images_are_made_smaller(server, configure, tmp_path):
    """To a shorter side of so many pixels, in proportion, as JPEG; smaller ones stay as they came."""
    server.files |= {"/wide.png": picture(0, (200, 100), "PNG"), "/tall.jpg": picture(1, (60, 120))}
    server.files |= {"/small.webp": picture(2, (20, 10), "WEBP"), "/small.gif": picture(3, (20, 10), "GIF")}
    names = ["wide.png", "tall.jpg", "small.webp", "small.gif"]
    run(configure([f"{server.url}/{name}" for name in names], "list.txt", short_side=50))
    found = list(samples(tmp_path / "out").values())
    assert [Image.open(io.BytesIO(sample["jpg"])).size for sample in found[:2]] == [(100, 50), (50, 100)]
    assert found[2]["webp"] == server.files["/small.webp"]
    assert Image.open(io.BytesIO(found[3]["jpg"])).size == (20, 10)


def test_servers_are_spared(server, configure, tmp_path):
    """No more connections to one server than allowed, pauses between requests, and a name to complain to."""
    server.delay = 0.05
    lines = [f"{server.url}/{k % 5}.jpg" for k in range(12)]
    run(configure(lines, "list.txt", per_host=3, user_agent="me (me@example.org)"))
    assert server.most_open <= 3
    assert server.agents == {"me (me@example.org)"}
    start = time.monotonic()
    run(configure(lines, "list.txt", delay=0.1, out=str(tmp_path / "slow")))
    assert time.monotonic() - start > 11 * 0.1  # twelve requests have eleven pauses


def test_a_run_goes_on_where_it_was_ended(server, configure, tmp_path, monkeypatch):
    """Nothing that is there is fetched again, in whole shards and in one that was begun; no failure is listed twice."""
    config = configure(
        [f"{server.url}/{k}.jpg" for k in [0, 9, 1, 8, 2, 3]], "list.txt", rows_per_shard=3, connections=1
    )
    whole = Web.fetch

    async def ended(self, url):
        if url.endswith("/3.jpg"):
            raise KeyboardInterrupt
        return await whole(self, url)

    monkeypatch.setattr(Web, "fetch", ended)
    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)):
        run(config)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar"]
    monkeypatch.setattr(Web, "fetch", whole)
    server.requests.clear()
    run(config)
    assert sorted(path for _, path, _ in server.requests) == ["/3.jpg", "/8.jpg"]
    assert [record["key"] for record in failures(tmp_path / "out")] == ["000000001", "000000003"]
    assert list(samples(tmp_path / "out")) == ["000000000", "000000002", "000000004", "000000005"]
    assert not list((tmp_path / "out").glob("*.part")) + list((tmp_path / "out").glob(".0*"))
    server.requests.clear()
    run(config)
    assert server.requests == []


def test_ended_while_a_tar_was_made(server, configure, tmp_path, monkeypatch):
    """The failures of that shard are not counted twice."""
    config = configure([f"{server.url}/{k}.jpg" for k in [0, 9]], "list.txt")

    def ended(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(download.os, "replace", lambda a, b: ended() if str(b).endswith(".tar") else a.rename(b))
    with pytest.raises(OSError, match="No space left"):
        run(config)
    monkeypatch.undo()
    run(config)
    assert len(failures(tmp_path / "out")) == 1
    assert list(samples(tmp_path / "out")) == ["000000000"]


def test_a_folder_of_something_else_is_refused(server, configure, tmp_path):
    """Another list, other settings, or tars of unknown origin; nothing is overwritten."""
    lines = [f"{server.url}/0.jpg"]
    run(configure(lines, "list.txt"))
    with pytest.raises(ConfigError, match="was begun with another short_side, quality"):
        run(configure(lines, "list.txt", short_side=8, quality=50))
    with pytest.raises(ConfigError, match="was begun with another urls_sha256"):
        run(configure([*lines, *lines], "list.txt"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.tar").touch()
    with pytest.raises(ConfigError, match="holds tars that did not come from kd-accel download"):
        run(configure(lines, "list.txt", out=str(tmp_path / "mine")))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "127.1", "0", "[::ffff:127.0.0.1]"])
def test_private_addresses_are_refused(server, configure, tmp_path, host):
    """However they are written; no request arrives."""
    port = server.url.rpartition(":")[2]
    run(configure([f"http://{host}:{port}/0.jpg"], "list.txt", allow_private=False))
    assert server.requests == []
    assert failures(tmp_path / "out")[0]["kind"] in ("private address", "no URL")


def test_a_redirect_to_a_private_address_is_refused(server, configure, tmp_path, monkeypatch):
    """A public server may send anybody anywhere; here loopback stands for the public one."""
    monkeypatch.setattr("kd_accel.download.web.is_public", lambda address: address == "127.0.0.1")
    server.redirects = {"/address": "http://169.254.169.254/latest", "/name": "http://rebound.test/0.jpg"}
    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", lambda *_: asyncio.sleep(0, [{"host": "10.0.0.1"}]))
    run(configure([f"{server.url}/address", f"{server.url}/name"], "list.txt", allow_private=False))
    records = failures(tmp_path / "out")
    assert [record["kind"] for record in records] == ["private address"] * 2
    assert [record["reason"] for record in records] == ["169.254.169.254", "rebound.test is 10.0.0.1"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public
