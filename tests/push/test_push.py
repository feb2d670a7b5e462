"""kd-accel push against a Hub on this machine: whole, through failures, and never with the token in sight."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from fake_hub import TOKEN, FakeHub

from kd_accel.export.verb import run as export
from kd_accel.export_config import ExportConfig

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
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    assert TOKEN not in output
    return output


def test_a_release_is_pushed_and_loaded_from_there(hub, folder, tmp_path):
    """Private, every file, a tag; open_clip has the same weights from the Hub as from the folder."""
    push(hub, tmp_path, str(folder), "repo=me/student", "tag=v1")
    repo = hub.repos["me/student"]
    assert (repo.private, repo.files) == (True, content(folder))
    assert repo.tags == {"v1": repo.head}
    env = os.environ | hub.environment(tmp_path)
    subprocess.run([sys.executable, "-c", LOAD, str(folder)], env=env, check=True, timeout=120)


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
    """In the middle of it, with the weights sent and no commit; the local release stays whole."""
    before = content(folder)
    hub.fail = [("POST", "/commit/", 500, 10**6)]
    process = start(hub, tmp_path, str(folder), "repo=me/student", "retries=1000")
    deadline = time.monotonic() + 60
    while not any("/commit/" in path for _, path in hub.asked) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert hub.repos["me/student"].files == {}
    hub.fail = []
    push(hub, tmp_path, str(folder), "repo=me/student")
    assert hub.repos["me/student"].files == content(folder) == before


def test_a_run_is_pushed_at_its_newest_checkpoint(hub, folder, tmp_path):
    """With a card and the step as its tag; nothing is left in the run."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_00000020"
    shutil.copytree(folder, checkpoint / "student")
    (run / "checkpoints" / "latest").write_text("step_00000020")
    push(hub, tmp_path, str(run), "repo=me/student", "private=false")
    repo = hub.repos["me/student"]
    assert (repo.private, list(repo.tags)) == (False, ["step-20"])
    assert repo.files["README.md"].startswith(b"---\n")
    assert [path.name for path in checkpoint.iterdir()] == ["student"]


def test_a_folder_without_a_card_is_said(hub, tmp_path):
    release = tiny.write_teacher(tmp_path / "release")
    assert "no README.md, the model card: kd-accel export" in push(hub, tmp_path, str(release), "repo=a/b", code=2)
