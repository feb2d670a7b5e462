"""A run that is killed with SIGKILL and resumed is the run that was never killed, bit for bit."""

import json
import os
import random
import sys
import time

import pytest
import torch
import warm_python
from conftest import REPO, kill_tree, run_process
from marks import slow_but
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

STEPS, SAVE_EVERY = 14, 3  # of 5 per epoch: every sample is met again
TERMS = [  # with all that can be learned and remembered beside the weights
    "clip: {kind: clip}",
    "feature: {kind: feature_mse, confidence: true}",
    "kl: {kind: logit_kl}",
    "icl: {kind: interactive_contrastive, scale: own}",
    "fusion: {kind: augmented_feature}",
    "gcl: {kind: global_contrastive, variant: v2, gamma: 0.6}",
    "tempnet: {kind: global_contrastive, gamma: 0.6, temperature: network, network: {prototypes: 5, lr: 0.01}}",
    "queue: {kind: compress, queues: 2q, queue_size: 13, temperature: 0.5}",
    "dino: {kind: dino, teacher_temperature: 0.5}",
]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def zero(stage: int) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


SHARDED = "objective.memory=sharded"  # each rank remembers its part of the samples; off by default
LAUNCHES = {"one process": ([sys.executable], {}, []), "ZeRO-2 on two": (TWO, zero(2), [SHARDED])}
OTHERS = {"one process": ([sys.executable], {}), "DDP on two": (TWO, {}), "ZeRO-3 on two": (TWO, zero(3))}


def command(launcher: list[str], folder, shards, teacher, name: str, *extra: str, dropout: float = 0.5) -> list[str]:
    """`kd-accel train` of a tiny student whose patch dropout draws random numbers at every step."""
    vision = f"{{image_size: 32, patch_size: 8, width: 16, layers: 1, head_width: 8, patch_dropout: {dropout}}}"
    text = "{context_length: 12, vocab_size: 49408, width: 16, heads: 2, layers: 1}"
    return [
        *launcher, "-m", "kd_accel", "train", f"name={name}", f"output_dir={folder}", "precision=fp32",
        f"data={{shards: {shards}, global_batch_size: 8, num_workers: 1, augment: {{scale: [0.5, 1.0]}}}}",
        f"student.arch={{embed_dim: 8, vision_cfg: {vision}, text_cfg: {text}}}", "student.projector=linear",
        f"teacher.path={teacher}",
        f"objective.terms={{{', '.join(TERMS)}}}",
        f"optim={{lr: 0.01, steps: {STEPS}, warmup_steps: 2}}",
        f"save.every_steps={SAVE_EVERY}", "log.every_steps=1", *extra,
    ]  # fmt: skip


def curve(run) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("samples_per_second", "data_wait", "seconds/")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def kill_at(step: int, words: list[str], run, env: dict) -> None:
    """Start `words` and SIGKILL all of its processes as soon as `step` is in metrics.jsonl."""
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPO)}
    with open(run.with_suffix(".log"), "w") as log:
        process = warm_python.Popen(
            words, cwd=REPO, env={**os.environ, **quiet, **env}, stdout=log, stderr=log, start_new_session=True
        )
        deadline = time.monotonic() + 300
        while not ((run / "metrics.jsonl").exists() and len(curve(run)) >= step):
            assert process.poll() is None, run.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, "the run does not get to the step"
            time.sleep(0.01)
        kill_tree(process.pid)
        process.wait()


@pytest.mark.parametrize("launch", slow_but(["ZeRO-2 on two"], LAUNCHES))
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, train_shards, tiny_teacher):
    """kill -9 at a random step, resume=auto: loss curve and final weights equal those of the whole run exactly."""
    launcher, env, extra = LAUNCHES[launch]
    given = tmp_path, train_shards, tiny_teacher
    words = {name: command(launcher, *given, name, *extra) for name in ("whole", "killed")}
    run_process(words["whole"], env=env)
    step = random.Random().randint(SAVE_EVERY + 1, STEPS - 1)  # another one each time; shown when the test fails
    kill_at(step, words["killed"], tmp_path / "killed", env)
    run_process([*words["killed"], "resume=auto"], env=env)

    whole, killed = curve(tmp_path / "whole"), curve(tmp_path / "killed")
    assert [row["step"] for row in killed] == list(range(1, STEPS + 1))
    assert killed == whole, f"killed at step {step}"
    last = f"checkpoints/step_{STEPS:08d}/state"
    for file in sorted((tmp_path / "whole" / last).glob("*.safetensors")):
        want, got = load_file(file), load_file(tmp_path / "killed" / last / file.name)
        assert want.keys() == got.keys()
        for name in want:
            assert torch.equal(want[name].nan_to_num(), got[name].nan_to_num()), (
                f"{file.name}: {name} (killed at {step})"
            )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, train_shards, tiny_teacher):
    """A ZeRO-2 run on two ranks without dropout, which draws differently on another number of ranks; memory sharded."""
    folder = tmp_path_factory.mktemp("whole")
    extra = ["save.keep_last=9", "optim.eps=1e-2", SHARDED]
    run_process(command(TWO, folder, train_shards, tiny_teacher, "whole", *extra, dropout=0), env=zero(2))
    return folder / "whole"


@pytest.mark.parametrize("launch", slow_but(["ZeRO-3 on two"], OTHERS))
def test_checkpoint_goes_on_under_another_engine(launch, whole, tmp_path, train_shards, tiny_teacher):
    """ZeRO-2's checkpoint of two ranks continues elsewhere on the same samples, replicated: the same curve, up to
    rounding."""
    launcher, env = OTHERS[launch]
    half = whole / "checkpoints" / "step_00000006"
    extra = [f"resume={half}", "optim.eps=1e-2"]
    run_process(command(launcher, tmp_path, train_shards, tiny_teacher, "branch", *extra, dropout=0), env=env)
    branch = curve(tmp_path / "branch")
    assert [row["step"] for row in branch] == list(range(7, STEPS + 1))
    for ours, theirs in zip(branch, curve(whole)[6:], strict=True):
        for name in ("loss", "grad_norm", "temperature", "samples"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), f"{name} at step {ours['step']}"
