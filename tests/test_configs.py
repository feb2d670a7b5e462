"""Every YAML file that comes with the repository is valid: ours for its verb, the launchers' for accelerate."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import run_process

from kd_accel.config import TrainConfig
from kd_accel.config_files import dump, load
from kd_accel.eval_config import EvalConfig
from kd_accel.schema import ConfigError

REPO = Path(__file__).resolve().parent.parent
SCHEMAS = {"configs": TrainConfig, "configs/eval": EvalConfig}  # by folder
FRAGMENTS = ["base.yaml"]  # only there to be included
CONFIGS = [path.relative_to(REPO) for path in sorted((REPO / "configs").rglob("*.y*ml")) if path.name not in FRAGMENTS]
# file -> distributed type, processes, ZeRO stage
LAUNCHERS = {
    "single": ("NO", 1, None),
    "ddp": ("MULTI_GPU", 2, None),
    "zero1": ("DEEPSPEED", 2, 1),
    "zero2": ("DEEPSPEED", 2, 2),
    "zero3": ("DEEPSPEED", 2, 3),
    "zero3_offload": ("DEEPSPEED", 2, 3),
    "fsdp2": ("FSDP", 2, None),
}


def schema_for(path: Path):
    """The schema of a file under configs/, by its folder."""
    return SCHEMAS[path.parent.as_posix()]


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_is_valid_and_round_trips(path, tmp_path):
    """What a run would write as its resolved config reads back equal."""
    given = {"model": "runs/NAME"} if schema_for(path) is EvalConfig else {}  # which no file names
    config = load(schema_for(path), [REPO / path], **given)
    (tmp_path / "resolved.yaml").write_text(dump(config))
    assert load(schema_for(path), [tmp_path / "resolved.yaml"]) == config


def test_base_is_a_valid_fragment(tmp_path):
    """With the smallest experiment on top it is a whole config, and it changes something."""
    (tmp_path / "smallest.yaml").write_text(tiny.TRAIN_YAML)
    whole = load(TrainConfig, [REPO / "configs/base.yaml", tmp_path / "smallest.yaml"])
    assert whole != load(TrainConfig, [tmp_path / "smallest.yaml"])


def test_an_invalid_config_is_found(tmp_path):
    (tmp_path / "broken.yaml").write_text(tiny.TRAIN_YAML.replace("lr:", "lrr:"))
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        load(schema_for(Path("configs/broken.yaml")), [tmp_path / "broken.yaml"])


def test_every_launcher_has_its_line_here():
    """All YAML files there but SkyPilot's are accelerate's."""
    assert {path.stem for path in (REPO / "launch").glob("*.yaml")} - {"skypilot"} == set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_accelerate_takes_the_launcher(name):
    """Its own loader knows every key, and its own check gives the type, the processes and the stage that are meant."""
    distributed_type, processes, stage = LAUNCHERS[name]
    path = REPO / "launch" / f"{name}.yaml"
    defaults = load_config_from_file(str(path))
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "kd_accel", "train"])
    )
    assert defaults.distributed_type.value == distributed_type
    chosen = {"DEEPSPEED": args.use_deepspeed, "MULTI_GPU": args.multi_gpu, "FSDP": args.use_fsdp}
    assert [kind for kind, used in chosen.items() if used] == [distributed_type] * (distributed_type in chosen)
    assert args.num_processes == processes
    assert not args.use_fsdp or args.fsdp_version == 2
    assert defaults.deepspeed_config.get("zero_stage") == stage
    assert (args.module, args.training_script, args.training_script_args) == (True, "kd_accel", ["train"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_leave_precision_and_port_open(name):
    """`precision` of the run's config decides; two runs on one machine must not meet on a port."""
    path = REPO / "launch" / f"{name}.yaml"
    config = yaml.safe_load(path.read_text())
    assert config.get("mixed_precision", "no") == "no"
    assert config.get("main_process_port", 0) == 0
    assert path.read_text().startswith("#")
    assert f"accelerate launch --config_file launch/{name}.yaml" in path.read_text()


@pytest.mark.distributed
def test_a_launcher_starts_its_ranks(tmp_path):
    """Two ranks that know of each other, on a machine without a GPU too."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, pathlib\n"
        "name = '{RANK} of {WORLD_SIZE}'.format(**os.environ)\n"
        f"(pathlib.Path({str(tmp_path)!r}) / name).touch()\n"
    )
    launch = "from accelerate.commands.accelerate_cli import main; main()"
    run_process([sys.executable, "-c", launch, "launch", "--config_file", "launch/zero2.yaml", str(script)])
    assert sorted(path.name for path in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"]
