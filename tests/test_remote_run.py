"""A run on remote shards is the run on local ones: the same order, the same losses."""

from __future__ import annotations

import json
from collections import deque

import pytest
import tiny
from faulty_server import FaultyServer

from kd_accel.cli import main
from kd_accel.config import TrainConfig
from kd_accel.schema import ConfigError, validate
from kd_accel.train import run


@pytest.fixture
def train(tmp_path):
    """(name, shards, more of data) -> the losses of three epochs of a student alone."""

    def start(name, shards, **data) -> list[float]:
        cache = {"folder": str(tmp_path / "cache"), "ahead": 1, "stall_seconds": 5}
        values = {
            "name": name,
            "output_dir": str(tmp_path),
            "precision": "fp32",
            "data": {"shards": shards, "batch_size": 8, "num_workers": 2, "cache": cache, "shuffle_window": 1, **data},
            "student": {"arch": tiny.arch()},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1e-2, "epochs": 3},
            "log": {"every_steps": 1},
        }
        run(validate(TrainConfig, values))
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    return start


def test_the_losses_are_those_of_local_shards(train, train_shards, tmp_path):
    """With two loader processes, over http, with a dropped connection on the way; in a cache too small for all."""
    local = train("local", str(train_shards))
    size = max(path.stat().st_size for path in train_shards.glob("*.tar"))
    with FaultyServer() as server:
        server.files = {f"/d/{path.name}": path.read_bytes() for path in train_shards.iterdir()}
        server.faults = {"/d/00000.tar": deque(["cut"])}
        cache = {"folder": str(tmp_path / "cache"), "ahead": 0, "max_gib": 2 * size / 2**30, "stall_seconds": 5}
        assert train("remote", f"{server.url}/d", cache=cache) == local
    assert len(local) == 15


def test_shards_that_have_been_read_make_room(train, tmp_path):
    """The cache stays at its limit: two windows of one shard for two processes, and one ahead; none comes twice."""
    shards = tiny.write_shards(tmp_path / "many", shards=6, per_shard=64)
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    cache = {"folder": str(tmp_path / "cache"), "ahead": 1, "max_gib": 3 * size / 2**30, "stall_seconds": 5}
    with FaultyServer() as server:
        server.files = {f"/d/{path.name}": path.read_bytes() for path in shards.iterdir()}
        assert len(train("remote", f"{server.url}/d", cache=cache)) == 144
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) <= 3
    assert max(len(server.gets(f"/d/{shard:05d}.tar")) for shard in range(6)) <= 3  # once per epoch


def test_a_stream_trains(train, train_shards):
    """Without an index; its loss falls too."""
    with FaultyServer() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in train_shards.glob("*.tar")}
        losses = train("stream", f"{server.url}/{{00000..00001}}.tar", loader="stream", num_samples=40, stream_buffer=8)
    assert len(losses) == 15
    assert sum(losses[-5:]) < sum(losses[:5])


def test_indexing_by_the_verb(train, train_shards, tmp_path, capsys):
    """kd-accel index URL, then the run."""
    with FaultyServer() as server:
        server.files = {f"/d/{path.name}": path.read_bytes() for path in train_shards.glob("*.tar")}
        shards = f"{server.url}/d/{{00000..00001}}.tar"
        with pytest.raises(ConfigError, match=r"2 of 2 remote shards have no index.*run kd-accel index"):
            train("early", shards)
        assert main(["index", shards, f"cache.folder={tmp_path / 'cache'}"]) == 0
        assert "40 samples in 2 shards: 2 indexed now, 0 already were." in capsys.readouterr().out
        assert len(train("late", shards)) == 15
