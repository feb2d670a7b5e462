"""kd-accel push against a Hub on this machine: whole, through failures, and never with the token in sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import tiny
from fake_hub import TOKEN, FakeHub

from kd_accel.export.verb import run as export
from kd_accel.export_config import ExportConfig
from kd_accel.push.verb import run
from kd_accel.push_config import PushConfig
from kd_accel.schema import ConfigError

PATIENCE_S = 300
LOAD = """
import open_clip, sys, torch
theirs, _, _ = open_clip.create_model_and_transforms("hf-hub:me/student")
ours, _, _ = open_clip.create_model_and_transforms("local-dir:" + sys.argv[1])
assert all(value.equal(ours.state_dict()[key]) for key, value in theirs.state_dict().items())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An exported release with its card."""
    place = tmp_path_factory.mktemp("push")
    export(ExportConfig(model=str(tiny.write_teacher(place / "untrained")), out=str(place / "student")))
    return place / "student"


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def start(hub: FakeHub, home: Path, *words: str, token: str | None = TOKEN) -> subprocess.Popen:
    env = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | hub.environment(home, token)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-m", "kd_accel", "push", *words, "pause_s=0.01"], env=env, **pipes)


def push(hub: FakeHub, home: Path, *words: str, code: int = 0, token: str | None = TOKEN) -> str:
    process = start(hub, home, *words, token=token)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, output
    assert TOKEN not in output
    return output


def test_a_release_is_pushed_with_all_that_is_in_it(hub, folder, tmp_path, monkeypatch):
    """Private, every file, a tag; the token is not even in what the Hub's client prints of every request."""
    monkeypatch.setenv("HF_DEBUG", "1")
    assert "/api/repos/create" in push(hub, tmp_path, str(folder), "repo=me/student", "tag=v1")
    repo = hub.repos["me/student"]
    assert (repo.private, repo.files) == (True, content(folder))
    assert repo.tags == {"v1": repo.head}


def test_failures_of_the_network_and_the_server_pass(hub, folder, tmp_path):
    """A server error, too many requests, a conflict and a connection that breaks off, at every step."""
    hub.fail = [
        ("POST", "/repos/create", 503, 1),
        ("POST", "/preupload/", 429, 1),
        ("PUT", "/_large/", "drop", 1),
        ("POST", "/commit/", 500, 1),
        ("POST", "/commit/", 409, 1),
        ("POST", "/tag/", "drop", 1),
    ]
    output = push(hub, tmp_path, str(folder), "repo=student", "tag=v1")
    assert "again in" in output
    assert hub.repos["me/student"].files == content(folder)
    assert [left for *_, left in hub.fail] == [0] * 6


@pytest.mark.parametrize(
    ("fail", "token", "said"),
    [
        ([], None, "no token for the HuggingFace Hub: set HF_TOKEN"),
        ([], "hf_another", "the Hub refuses the token for this (create_repo)"),
        ([("POST", "/commit/", 403, 9)], TOKEN, "the Hub refuses the token for this (upload)"),
        ([("POST", "/commit/", 500, 99)], TOKEN, "the Hub is not reached (upload, 3 attempts)"),
        ([("POST", "/commit/", 422, 9)], TOKEN, "the Hub does not do it (upload)"),
    ],
)
def test_what_does_not_pass_is_one_line(hub, folder, tmp_path, fail, token, said):
    """Exit code 2, and the folder is as it was."""
    hub.fail, before = fail, content(folder)
    output = push(hub, tmp_path, str(folder), "repo=me/student", "retries=2", code=2, token=token)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in output
    assert "hf_another" not in output
    assert content(folder) == before


def test_a_push_that_was_killed_is_completed_by_the_next(hub, folder, tmp_path):
    """In the middle of the weights. The local release stays whole, and nobody who lists processes sees the token;
    open_clip then has the same weights from the Hub as from the folder.
    """
    before = content(folder)
    hub.fail = [("PUT", "/_large/", "hang", 1)]
    process = start(hub, tmp_path, str(folder), "repo=me/student")
    assert hub.hangs.wait(PATIENCE_S), process.poll()
    assert not any(TOKEN in word for word in command_lines(process.pid))
    process.kill()
    assert TOKEN not in process.communicate()[0]
    assert hub.repos["me/student"].files == {}
    push(hub, tmp_path, str(folder), "repo=me/student")
    assert hub.repos["me/student"].files == content(folder) == before
    env = os.environ | hub.environment(tmp_path)
    subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=env, check=True, timeout=PATIENCE_S)


def command_lines(pid: int) -> list[str]:
    """The words that a process and those that it has started were called with."""
    process = psutil.Process(pid)
    return [word for each in (process, *process.children(recursive=True)) for word in each.cmdline()]


@pytest.fixture
def run_folder(folder, tmp_path) -> Path:
    """A run with a checkpoint of step 20, and what it logged."""
    place = tmp_path / "run"
    shutil.copytree(folder, place / "checkpoints" / "step_00000020" / "student")
    (place / "checkpoints" / "latest").write_text("step_00000020")
    (place / "config.yaml").write_text("optim: {lr: 0.5}\n")
    (place / "metrics.jsonl").write_text('{"step": 20, "loss": 1.5}\n')
    return place


def test_a_run_is_pushed_at_its_newest_checkpoint(hub, run_folder, tmp_path):
    """With a card, its picture, and the step as its tag; nothing is left in the run, also by a push that was killed."""
    hub.fail = [("POST", "/commit/", "hang", 1)]
    process = start(hub, tmp_path, str(run_folder), "repo=me/student")
    assert hub.hangs.wait(PATIENCE_S), process.poll()
    process.kill()
    process.communicate()
    output = push(hub, tmp_path, str(run_folder), "repo=me/student", "private=false", "license=mit")
    assert ".push" not in output  # which is gone by then
    repo = hub.repos["me/student"]
    assert list(repo.tags) == ["step-20"]
    card = repo.files["README.md"].decode()
    assert card.startswith("---\n")
    assert all(line in card.splitlines() for line in ("# student", "license: mit", "  lr: 0.5"))
    assert "](curves.png)" in card
    assert repo.files["curves.png"].startswith(b"\x89PNG")
    assert [path.name for path in (run_folder / "checkpoints" / "step_00000020").iterdir()] == ["student"]


def test_a_card_that_is_there_is_not_changed(folder):
    with pytest.raises(ConfigError, match=f"license=mit: {folder} has its card"):
        run(PushConfig(model=str(folder), repo="me/student", license="mit"))


@pytest.mark.parametrize("token", ["\u201chf_another\u201d", "hf_another\x0bone"])
def test_a_token_that_cannot_be_sent_is_not_shown(folder, monkeypatch, token):
    """As one that was copied with quotation marks."""
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match="set HF_TOKEN anew") as error:
        run(PushConfig(model=str(folder), repo="me/student"))
    assert "hf_another" not in str(error.value)


def test_a_folder_without_a_card_is_said(hub, tmp_path):
    release = tiny.write_teacher(tmp_path / "release")
    assert "no README.md, the model card: kd-accel export" in push(hub, tmp_path, str(release), "repo=a/b", code=2)
