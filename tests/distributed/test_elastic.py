"""A run that changes engine, ranks and micro-batches on its way is the run that never did, up to rounding.

So is one that torchrun starts again after a process of it died, to the bit.
"""

import re
import sys

import psutil
import pytest
from conftest import run_process
from distributed import ids_worker
from distributed.ids_worker import noted
from distributed.test_faults import LONG as STEPS_40
from distributed.test_faults import SELDOM, Ranks, assert_same_run, reached, whole  # noqa: F401  the fixture among them
from distributed.test_resume import SAVE_EVERY, SHARDED, STEPS, TWO, command, curve, zero

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

FOUR = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
LEGS = [
    ("ZeRO-2 on two", TWO, zero(2), [SHARDED]),
    ("one process", [sys.executable], {}, ["train.accumulate=4"]),
    ("ZeRO-3 on four", FOUR, zero(3), []),
    ("ZeRO-1 on four", FOUR, zero(1), ["train.accumulate=2"]),
]
PER_EPOCH = 5  # steps: 40 samples, 8 at a time


@pytest.fixture(scope="module")
def legs(tmp_path_factory, train_shards, tiny_teacher):
    """Each goes on from a checkpoint of the one before, to the same end: (metrics, sample ids by step) of each."""
    found, base = [], tmp_path_factory.mktemp("legs")
    for number, (_, launcher, env, extra) in enumerate(LEGS):
        (ids := base / f"ids{number}").mkdir()
        start = base / f"leg{number - 1}" / "checkpoints" / f"step_{number * SAVE_EVERY:08d}"
        extra = ["optim.eps=1e-2", "save.keep_last=9", *extra, *([f"resume={start}"] if number else [])]
        words = command(launcher, base, train_shards, tiny_teacher, f"leg{number}", *extra, dropout=0)
        words = [*launcher, ids_worker.__file__, *words[words.index("train") :]]
        run_process(words, env={**env, "IDS": str(ids)})
        found.append((curve(base / f"leg{number}"), noted(ids)))
    return found


def test_from_two_to_one_to_four(legs):
    """The same losses within 1e-4."""
    expected, _ = legs[0]
    for number, (rows, _) in enumerate(legs):
        assert [row["step"] for row in rows] == list(range(number * SAVE_EVERY + 1, STEPS + 1))
        for ours, theirs in zip(rows, expected[number * SAVE_EVERY :], strict=True):
            for name in ("loss", "grad_norm", "temperature", "samples"):
                where = f"{LEGS[number][0]}: {name} at step {ours['step']}"
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4), where


def test_no_sample_is_lost_or_met_twice_on_the_way(legs):
    """Every launch continues with the same samples in the same order, and each epoch has all 40, once each."""
    _, expected = legs[0]
    for number, (_, batches) in enumerate(legs):
        assert batches == {step: expected[step] for step in range(number * SAVE_EVERY + 1, STEPS + 1)}
    for first in range(1, STEPS - PER_EPOCH + 2, PER_EPOCH):
        epoch = [sample for step in range(first, first + PER_EPOCH) for sample in expected[step]]
        assert sorted(epoch) == list(range(40))


@pytest.mark.parametrize("dies", ["rank 0", "rank 1"])
def test_torchrun_starts_again_what_died(dies, whole, tmp_path, train_shards, tiny_teacher):  # noqa: F811
    """kill -9 of one process under --max-restarts: all of them start again, resume=auto, and end as if nothing was."""
    launcher = [*TWO[:-1], "--max-restarts=2", "--monitor-interval=1", TWO[-1]]
    extra = [STEPS_40, SHARDED, SELDOM, "save.every_steps=5", "resume=auto"]
    words = command(launcher, tmp_path, train_shards, tiny_teacher, "run", *extra)
    with Ranks(words, tmp_path / "log", count=1, port=0, env=zero(2)) as torchrun:
        torchrun.wait_until(reached(tmp_path / "run", 12))
        ranks = sorted(psutil.Process(torchrun.processes[0].pid).children(), key=lambda rank: rank.pid)
        ranks[int(dies[-1])].kill()  # started one after the other
        assert torchrun.wait() == [0], torchrun.said()
        assert re.search(r"resumed from \S+step_000000(10|15|20|25|30|35)", torchrun.said()[0])
    assert_same_run(tmp_path / "run", whole)
