"""The section hub of training: checkpoints reach the Hub, and a Hub that fails costs a line."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import tiny
from fake_hub import TOKEN, FakeHub

from kd_accel.config import TrainConfig
from kd_accel.push.background import LOG
from kd_accel.schema import ConfigError, validate
from kd_accel.train import run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def train(tmp_path, train_shards):
    """A function that trains 4 steps, with checkpoints after 2 and 4, and returns the run's folder."""

    def go(**hub):
        values = {
            "name": "run",
            "output_dir": str(tmp_path / "runs"),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
            "student": {"arch": tiny.arch()},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1e-2, "steps": 4},
            "save": {"every_steps": 2},
            "hub": {"repo": "me/student", **hub},
        }
        run(validate(TrainConfig, values))
        return tmp_path / "runs" / "run"

    return go


def test_the_last_checkpoint_is_pushed_at_the_end(hub, train, caplog):
    """With its card and its step as a tag; the token is in no file of the run, in no log, and in no list of processes.

    The connection breaks off while the list is read.
    """
    caplog.set_level(logging.INFO, "kd_accel")
    hub.fail = [("POST", "/commit/", "hang", 1)]
    with ThreadPoolExecutor() as watcher:
        words = watcher.submit(called_while_it_hangs, hub)
        folder = train(license="mit")
    assert "repo=me/student" in words.result()
    assert not any(TOKEN in word for word in words.result())
    repo = hub.repos["me/student"]
    assert list(repo.tags) == ["step-4"]
    assert b"license: mit\n" in repo.files["README.md"]
    weights = folder / "checkpoints" / "step_00000004" / "student" / "open_clip_model.safetensors"
    assert repo.files["open_clip_model.safetensors"] == weights.read_bytes()
    assert "hub: pushed to http://127.0.0.1" in caplog.text
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*written, caplog.text.encode(), *repo.files.values()])


def called_while_it_hangs(hub: FakeHub) -> list[str]:
    """The words that this process and those that it has started were called with."""
    hub.hangs.wait(300)
    this = psutil.Process()
    words = [word for process in (this, *this.children(recursive=True)) for word in process.cmdline()]
    hub.go.set()
    return words


def test_every_checkpoint_is_pushed_but_those_that_would_wait(hub, train):
    """The last one always is."""
    train(push="every_checkpoint")
    tags = list(hub.repos["me/student"].tags)
    assert tags[-1] == "step-4"
    assert set(tags) <= {"step-2", "step-4"}


def test_a_hub_that_refuses_costs_a_line(hub, train, caplog, monkeypatch):
    """The run is done, and its folder whole."""
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    folder = train()
    assert (folder / "checkpoints" / "step_00000004" / "files.json").is_file()
    assert "hub: a push failed, and training is none the worse: error: the Hub refuses the token" in caplog.text
    assert "hf_another" not in caplog.text + (folder / LOG).read_text()


def test_without_a_token_nothing_starts(hub, train, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    with pytest.raises(ConfigError, match="hub: no token for the HuggingFace Hub"):
        train()
    assert not (tmp_path / "runs").exists()
