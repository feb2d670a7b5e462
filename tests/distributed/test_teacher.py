"""A teacher beside the student on two ranks: where its bytes lie, that no file has it, that steps leave nothing."""

from __future__ import annotations

import json
import math
from statistics import median

import pytest
import torch
from conftest import run_process
from distributed.teacher_worker import STEPS, case
from distributed.test_resume import TWO
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

WORKER = "tests/distributed/teacher_worker.py"
BF16 = 2  # bytes
PERSISTENT = 100_000  # elements: DeepSpeed keeps smaller parameters whole after their first use (its default)
CASES = [(3, "engine"), (2, "engine"), (3, "replicated"), (2, "replicated")]
# ZeRO-3 runs a linear layer as a product and a sum, each rounded to bf16 (2^-9 of a value): a dozen of such roundings.
TOLERANCE = 12 * 2**-9
TENSORS = 10  # of one per step, 80 would be there
BYTES = 10 * 2**20  # of the leak put in, 256 KiB per step, 20 MiB would be there


@pytest.fixture(scope="module")
def folder(tiny_teacher, tmp_path_factory):
    """What teacher_worker.py wrote of every case's three steps."""
    folder = tmp_path_factory.mktemp("bytes")
    run_process([*TWO, WORKER, str(folder), str(tiny_teacher), "bytes"])
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> dict[str, torch.Tensor]:
    """The teacher's parameters by name."""
    weights = load_file(tiny_teacher / "open_clip_model.safetensors")
    return {name: weight for name, weight in weights.items() if name != "logit_scale"}


def read(folder, of: str):
    return json.loads((folder / f"{of}.json").read_text())


@pytest.mark.parametrize(("stage", "placement"), CASES)
def test_bytes_per_rank(folder, teacher, stage, placement):
    """After a step ZeRO-3 has half of the teacher on each of two ranks, and small parameters whole; all else a copy."""
    sizes = [weight.numel() for weight in teacher.values()]
    for rank in read(folder, case(stage, placement))["ranks"]:
        if (stage, placement) == (3, "engine"):
            small = sum(size for size in sizes if size <= PERSISTENT)
            assert small < 0.05 * sum(sizes), "nothing is partitioned: this would prove nothing"
            assert rank["held"] == {"parts": BF16 * sum(math.ceil(n / 2) for n in sizes), "whole": BF16 * small}
        else:
            assert rank["held"] == {"parts": 0, "whole": BF16 * sum(sizes)}


@pytest.mark.parametrize(("stage", "placement"), CASES)
def test_features_are_the_plain_teachers(folder, stage, placement):
    """Gathered for its forward, at every one of three steps: the norm of the difference as a share of the features'."""
    for rank in read(folder, case(stage, placement))["ranks"]:
        assert rank["difference"] <= (TOLERANCE if (stage, placement) == (3, "engine") else 0)


@pytest.mark.parametrize(("stage", "placement"), CASES)
def test_optimizer_holds_the_student_alone(folder, stage, placement):
    """All ranks' flat partitions have as many elements as the student, whose even sizes need no padding."""
    found = read(folder, case(stage, placement))
    assert sum(rank["optimized"] for rank in found["ranks"]) == sum(math.prod(s) for s in found["trained"].values())


@pytest.mark.parametrize(("stage", "placement"), CASES)
def test_teacher_is_in_no_file(folder, teacher, stage, placement):
    """Names, shapes and bytes of every tensor in a checkpoint and its release are the student's."""
    trained = read(folder, case(stage, placement))["trained"]
    checkpoint = folder / case(stage, placement) / "checkpoints" / "step_00000003"
    files = {str(path.relative_to(checkpoint)): load_file(path) for path in checkpoint.rglob("*.safetensors")}
    of_student = [f"state/{name}.safetensors" for name in ("weights", "exp_avg", "exp_avg_sq")]
    others = ("objective", "memory_00000_of_00001", "random_00000", "random_00001")
    other = {f"state/{name}.safetensors" for name in others}
    release = "student/open_clip_model.safetensors"
    assert files.keys() == {*of_student, *other, release}

    for file in of_student:
        assert {name: list(tensor.shape) for name, tensor in files[file].items()} == trained, file
    released = {name.removeprefix("clip."): s for name, s in trained.items() if name.startswith("clip.")}
    assert {name: list(t.shape) for name, t in files[release].items()} == released | {"logit_scale": []}
    teachers = {tuple(weight.shape) for weight in teacher.values()}
    found = {tuple(tensor.shape) for tensors in files.values() for tensor in tensors.values()}
    assert not teachers & found  # the student is narrower in every layer
    whole = sum(weight.nbytes for weight in teacher.values())
    rest = sum(tensor.nbytes for file in other for tensor in files[file].values())
    assert rest < 0.05 * whole


def growth(looks: list[list[int]]) -> tuple[float, float]:
    """(live tensors, resident bytes) of one rank, from the first five looks to the last five: over 80 steps."""
    assert looks[-1][0] - looks[0][0] == STEPS
    return tuple(median(look[k] for look in looks[-5:]) - median(look[k] for look in looks[:5]) for k in (1, 2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_steps_leave_nothing_behind(tiny_teacher, tmp_path, capsys):
    """100 steps after the warm-up: neither tensors nor memory grow; a hook that keeps each step's features shows."""
    run_process([*TWO, WORKER, str(tmp_path), str(tiny_teacher), "steps"], timeout=1100, cold=True)
    names = [case(3, "engine"), case(2, "replicated"), f"{case(3, 'engine')}-leak"]
    grown = {name: [growth(looks) for looks in read(tmp_path, name)] for name in names}
    with capsys.disabled():
        for name, ranks in grown.items():
            print(f"\n{name}:", *(f"{tensors:+.0f} tensors, {size / 2**20:+.1f} MiB;" for tensors, size in ranks))
    for name, ranks in grown.items():
        for tensors, size in ranks:
            assert (tensors > TENSORS, size > BYTES) == (name.endswith("leak"),) * 2, name
