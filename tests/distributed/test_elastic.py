"""A run that changes engine, ranks and micro-batches on its way is the run that never did, up to rounding."""

import sys

import pytest
from conftest import run_process
from distributed.test_resume import SAVE_EVERY, STEPS, command, curve, whole, zero  # noqa: F401  the fixture among them

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

FOUR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
LEGS = [  # after ZeRO-2 on two
    ("one process", [sys.executable], {}, ["train.accumulate=4"]),
    ("ZeRO-3 on four", FOUR, zero(3), []),
    ("ZeRO-1 on four", FOUR, zero(1), ["train.accumulate=2"]),
]


def test_from_two_to_one_to_four(whole, tmp_path, train_shards, tiny_teacher):  # noqa: F811
    """Each leg goes on from the one before: the same samples, so the same losses within 1e-4."""
    found, folder = [], whole
    for number, (_, launcher, env, extra) in enumerate(LEGS, start=1):
        start = folder / "checkpoints" / f"step_{number * SAVE_EVERY:08d}"
        words = [f"resume={start}", "optim.eps=1e-2", "save.keep_last=9", *extra]
        run_process(command(launcher, tmp_path, train_shards, tiny_teacher, f"leg{number}", *words, dropout=0), env=env)
        folder = tmp_path / f"leg{number}"
        found.append(curve(folder))
    expected = curve(whole)
    for number, rows in enumerate(found, start=1):
        assert [row["step"] for row in rows] == list(range(number * SAVE_EVERY + 1, STEPS + 1))
        for ours, theirs in zip(rows, expected[number * SAVE_EVERY :], strict=True):
            for name in ("loss", "grad_norm", "temperature", "samples"):
                where = f"{LEGS[number - 1][0]}: {name} at step {ours['step']}"
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), where
