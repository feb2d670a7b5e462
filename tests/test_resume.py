"""Which checkpoint a run goes on from, and what it refuses before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_accel import resume
from kd_accel.config import TrainConfig
from kd_accel.config_files import dump
from kd_accel.schema import ConfigError, validate


def config(asked: str) -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "x",
            "resume": asked,
            "data": {"shards": "none", "batch_size": 1},
            "student": {"arch": "ViT-B-32"},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1, "steps": 1},
        },
    )


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a checkpoint that is whole as far as its progress file tells."""
    state = tmp_path / "checkpoints" / "step_00000006" / "state"
    state.mkdir(parents=True)
    (state / "progress.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("name: x\n")
    return tmp_path


def test_a_run_that_is_not_there_starts_anew(tmp_path):
    assert resume.find(config("auto"), tmp_path) is None
    assert resume.find(config("never"), tmp_path) is None


def test_existing_run_is_refused(run):
    """resume=never names the two ways on."""
    with pytest.raises(ConfigError, match="this run exists; resume=auto goes on with it, name=OTHER"):
        resume.find(config("never"), run)


def test_path_must_be_a_checkpoint(run):
    """A run is not a checkpoint; a checkpoint is."""
    with pytest.raises(ConfigError, match="not a checkpoint directory"):
        resume.find(config(str(run)), run)
    wanted = run / "checkpoints" / "step_00000006"
    assert resume.find(config(str(wanted)), run) == wanted


def compare(folder: Path, old: dict, new: dict) -> list[str]:
    """What may change from a config with these sections to one with those."""
    (folder / "state").mkdir()
    base = config("never").model_dump()
    (folder / "state" / "config.yaml").write_text(dump(validate(TrainConfig, base | old)))
    (folder / "state" / "progress.json").write_text('{"global_batch": 1}')
    return resume.check_config(folder, validate(TrainConfig, base | new), global_batch=1)


KL = {"objective": {"terms": {"kl": {"kind": "logit_kl"}}}}


def test_a_resumed_run_may_move_its_teachers(tmp_path):
    """Where one computes is no matter of what it says."""
    here, there = ({"path": "t", "placement": placement} for placement in ("engine", "replicated"))
    (tmp_path / "one").mkdir(), (tmp_path / "many").mkdir()
    (line,) = compare(tmp_path / "one", {**KL, "teacher": here}, {**KL, "teacher": there})
    assert line == "teacher.placement: engine -> replicated"
    (line,) = compare(tmp_path / "many", {**KL, "teachers": {"a": here}}, {**KL, "teachers": {"a": there}})
    assert line == "teachers.a.placement: engine -> replicated"


def test_a_resumed_run_keeps_what_its_teachers_say(tmp_path):
    old, new = ({**KL, "teachers": {"a": {"path": "t", "weight": weight}}} for weight in (1.0, 2.0))
    with pytest.raises(ConfigError, match=r"teachers\.a\.weight: the checkpoint has 1\.0, the config 2\.0"):
        compare(tmp_path, old, new)


def test_a_term_is_not_free_by_its_name(tmp_path):
    """One that is called replacement has placement in it, and no more freedom than others."""
    old, new = ({"objective": {"terms": {"replacement": {"kind": "clip", "weight": w}}}} for w in (1.0, 2.0))
    with pytest.raises(ConfigError, match=r"objective\.terms\.replacement\.weight: the checkpoint has 1\.0"):
        compare(tmp_path, old, new)
