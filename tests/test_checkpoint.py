"""Which checkpoint counts as the newest, which ones stay, and how a damaged one is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from kd_accel import checkpoint
from kd_accel.config import SaveConfig
from kd_accel.schema import ConfigError


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with checkpoints of steps 2 to 12, all whole as far as their names and progress files tell."""
    for step in range(2, 13, 2):
        add(tmp_path, f"step_{step:08d}")
    (tmp_path / "checkpoints" / "latest").write_text("step_00000012\n")
    (tmp_path / "config.yaml").write_text("name: x\n")
    return tmp_path


def add(run: Path, name: str) -> Path:
    state = run / "checkpoints" / name / "state"
    state.mkdir(parents=True)
    (state / "progress.json").write_text("{}")
    return state.parent


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def test_latest_names_the_newest(run):
    """`latest` decides, not the highest number: a resumed run may lie behind an older one."""
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    assert checkpoint.newest(run).name == "step_00000004"


@pytest.mark.parametrize("pointer", [None, b"step_00000099\n", b"", bytes(13), b"\xff"])
def test_lost_pointer_falls_back_to_the_highest_step(run, pointer):
    """A deleted, dangling, empty or damaged `latest`, and a half-written checkpoint beside: the highest whole one."""
    (run / "checkpoints" / "latest").unlink()
    if pointer is not None:
        (run / "checkpoints" / "latest").write_bytes(pointer)
    add(run, ".partial_step_00000014")
    assert checkpoint.newest(run).name == "step_00000012"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, [10, 12]),
        ({"keep_last": 1, "keep_every": 4}, [4, 8, 12]),
        ({"keep_last": 99}, list(range(2, 13, 2))),
    ],
)
def test_keep_rules(run, options, kept):
    """The newest keep_last stay, and every multiple of keep_every."""
    checkpoint._prune(run / "checkpoints" / "step_00000012", SaveConfig(**options))
    assert steps(run) == kept


def test_what_is_published_stays(run):
    """Checkpoints of later steps, which a resumed run went back behind, do not push it out; its elders go."""
    partial = checkpoint.folder_for(run, 5)
    checkpoint.publish(partial, checkpoint.write(snapshot(5), partial), SaveConfig(keep_last=1))
    assert steps(run) == [5, 6, 8, 10, 12]
    assert checkpoint.newest(run).name == "step_00000005"


def test_a_kill_while_one_is_dropped_leaves_no_half(run, monkeypatch):
    """Neither of those that make room nor of the one that is replaced; drop_partial cleans up."""
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # killed before the first file is gone
    partial = checkpoint.folder_for(run, 8)
    checkpoint.publish(partial, checkpoint.write(snapshot(8), partial), SaveConfig(keep_last=2))
    assert steps(run) == [6, 8, 10, 12]
    monkeypatch.undo()
    checkpoint.drop_partial(run)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", *(f"step_{step:08d}" for step in (6, 8, 10, 12))}


def test_published_checkpoint_replaces_and_is_readable(run):
    """Publishing over a directory of the same step swaps it whole, moves `latest`, and leaves no partial."""
    partial = checkpoint.folder_for(run, 4)
    files = checkpoint.write(snapshot(4), partial)
    assert checkpoint.publish(partial, files, SaveConfig(keep_last=99)) == run / "checkpoints" / "step_00000004"
    assert not partial.exists()
    assert checkpoint.newest(run).name == "step_00000004"
    assert (run / "checkpoints/step_00000004/state/weights.safetensors").stat().st_mode & 0o444 == 0o444
    assert checkpoint.damage(run / "checkpoints" / "step_00000004") is None


def snapshot(step: int) -> checkpoint.Snapshot:
    tensors = {"state/weights.safetensors": {"w": torch.full((5,), float(step))}}
    return checkpoint.Snapshot(step, tensors, {"state/progress.json": json.dumps({"step": step})}, {})


@pytest.fixture
def written(tmp_path) -> Path:
    """A run with three checkpoints that were really written."""
    for step in (2, 4, 6):
        partial = checkpoint.folder_for(tmp_path, step)
        checkpoint.publish(partial, checkpoint.write(snapshot(step), partial), SaveConfig(keep_last=9))
    return tmp_path


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {"cut off": _cut, "not what was written": _flip, "No such file": Path.unlink}


@pytest.mark.parametrize("reason", DAMAGES)
@pytest.mark.parametrize("file", ["state/weights.safetensors", "state/progress.json"])
def test_damage_is_found_and_an_older_one_taken(written, reason, file):
    """A file that is shorter, other, or gone: said, and resume=auto takes the checkpoint before; PATH is refused."""
    newest = checkpoint.newest(written)
    DAMAGES[reason](newest / file)
    chosen, said = checkpoint.choose(newest, written, may_go_back=True)
    assert chosen.name == "step_00000004"
    (line,) = said
    assert str(newest) in line
    assert reason in line
    with pytest.raises(ConfigError, match=f"{reason}.*\n.*no whole checkpoint is left"):
        checkpoint.choose(newest, written, may_go_back=False)


def test_a_lost_list_of_files_is_damage(written):
    """Without files.json nothing can be verified."""
    newest = checkpoint.newest(written)
    (newest / "files.json").unlink()
    assert "files.json" in checkpoint.damage(newest)


def test_nothing_is_chosen_of_nothing(tmp_path):
    """A fresh run."""
    assert checkpoint.choose(None, tmp_path, may_go_back=True) == (None, [])
