"""Broken sets, models and processes under two ranks: a result, or a line that says why not; nobody waits for ever.

Ranks are started by hand, as SLURM does: no launcher ends the others when one of them dies.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import tiny
from distributed import eval_fault_worker
from distributed.test_eval import write_set
from distributed.test_faults import Ranks, errors_of
from marks import slow_but
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.distributed

TIMEOUT = 120  # seconds


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "untrained")


@pytest.fixture
def start(tmp_path, release, free_port):
    """A function that evaluates a model on sets/ with two ranks, or `count`; those alive at the end are killed."""
    started = []

    def begin(*extra: str, model: Path = release, fault: str | None = None, count: int = 2) -> Ranks:
        program = ["-m", "kd_accel"] if fault is None else [eval_fault_worker.__file__]
        values = [f"data={tmp_path / 'sets'}", "batch_size=4", f"output={tmp_path / 'results.jsonl'}", *extra]
        words = [sys.executable, *program, "eval", str(model), *values]
        folder = tmp_path / f"log{len(started)}"
        started.append(Ranks(words, folder, count=count, port=free_port, env={"FAULT": fault or ""}))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.kill()


def rows_of(folder: Path) -> list[dict]:
    path = folder / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def the_errors(ranks: Ranks) -> list[str]:
    """The lines that both ranks together end with, and nothing worse."""
    assert ranks.wait(TIMEOUT) == [2, 2], ranks.said()
    assert "Traceback" not in "".join(ranks.said())
    return errors_of(ranks)


def spoil(folder: Path, keys: range) -> None:
    """Zeros in the place of those images."""
    path = folder / "test/0.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for member in (tar.getmember(f"{key}.png") for key in keys):
            data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    path.write_bytes(data)


def break_set(folder: Path, what: str) -> None:
    tar = folder / "test/0.tar"
    match what:
        case "no tars":
            (folder / "test/nshards.txt").write_text("0")
        case "empty tar":
            tar.write_bytes(bytes(10240))
        case "cut tar":
            tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
        case "no captions":
            (folder / "dataset_type.txt").write_text("retrieval")
        case "class out of range":
            (folder / "classnames.txt").write_text("one\ntwo\nthree")
        case "all corrupt":
            spoil(folder, range(8))
        case "half corrupt":
            spoil(folder, range(4))


BROKEN = {
    "all corrupt": "all corrupt: none of its 8 images is readable; the first: 0: image cannot be decoded",
    "class out of range": "class out of range/test/0.tar: 3.cls is class 3, ",
    "cut tar": "cut tar/test/0.tar: not a whole tar",
    "empty tar": "empty tar: no samples in its 1 tars",
    "no captions": "no captions/test/0.tar: sample '0' has no member .txt",
    "no tars": "no tars: no samples in its 0 tars",
}


def test_broken_sets_are_a_line_each(start, tmp_path):
    """It names file and key; the others are evaluated: one whose images are corrupt in the share of one rank, one with
    a single image for two ranks with three workers each."""
    for what in [*BROKEN, "half corrupt"]:
        break_set(write_set(tmp_path / "sets" / what, [i % 6 for i in range(8)]), what)
    write_set(tmp_path / "sets" / "one image", [3])
    ranks = start("num_workers=3")
    lines = the_errors(ranks)
    assert len(lines) == len(BROKEN)
    for line, said in zip(lines, BROKEN.values(), strict=True):
        assert said in line
    assert [(row["key"], row["n"], row["bad"]) for row in rows_of(tmp_path)] == [
        ("half corrupt", 4, 4),
        ("one image", 1, 0),
    ]
    assert ranks.said()[0].count("left out 4 unreadable of 8 images") == 1
    assert "left out" not in ranks.said()[1]


def test_broken_weights_are_one_line(start, tmp_path, release):
    """A diverged checkpoint is not scored."""
    broken = shutil.copytree(release, tmp_path / "diverged")
    weights = load_file(broken / "open_clip_model.safetensors")
    weights["visual.proj"].fill_(float("nan"))
    save_file(weights, broken / "open_clip_model.safetensors")
    write_set(tmp_path / "sets" / "a", [i % 6 for i in range(9)])
    (line,) = the_errors(start(model=broken))
    assert "diverged: 9 of 9 image features of a are not finite: the weights of this checkpoint are broken" in line
    assert rows_of(tmp_path) == []


@pytest.mark.slow
def test_sets_that_vanish_are_a_line_each(start, tmp_path):
    """Between the looks of two ranks, and between two batches; nothing is scored that was there of them."""
    for name in ("gone", "going", "there"):
        write_set(tmp_path / "sets" / name, [i % 6 for i in range(9)])
    going, gone = the_errors(start(fault="vanishing"))
    assert "sets/going: went away while it was evaluated" in going
    assert "sets/gone/test/0.tar: not a whole tar: " in gone
    assert "No such file" in gone
    assert [row["key"] for row in rows_of(tmp_path)] == ["there"]


@pytest.mark.slow
def test_a_folder_that_one_rank_does_not_see_is_one_line(start, tmp_path):
    """A disk that is not mounted on its machine; the other rank does not wait for it."""
    write_set(tmp_path / "sets" / "a", [i % 6 for i in range(9)])
    (line,) = the_errors(start(fault="blind"))
    assert line == "error: data: /nowhere: no such folder"


@pytest.mark.parametrize("fault", slow_but(["dead"], ["dead", "hanging"]))
def test_a_lost_rank_ends_the_other(start, tmp_path, fault):
    """One line, long before the test's own timeout."""
    write_set(tmp_path / "sets" / "a", [i % 6 for i in range(26)])
    ranks = start("num_workers=1", fault=fault)
    assert ranks.processes[0].wait(TIMEOUT) == 2, ranks.said()
    (line,) = errors_of(ranks)
    assert line.startswith("error: rank 0: rank 1 died, or did not answer for ")
    assert "Traceback" not in ranks.said()[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_lost_worker_ends_every_rank(start, tmp_path, count):
    """The rank that lost it says so, the other one that a process died."""
    write_set(tmp_path / "sets" / "a", [i % 6 for i in range(26)])
    ranks = start("num_workers=1", fault="worker", count=count)
    assert ranks.wait(TIMEOUT) == [2] * count, ranks.said()
    assert "Traceback" not in "".join(ranks.said())
    lines = errors_of(ranks)
    assert len(lines) == count
    assert any("a worker of the data loader died; when memory was short, lower num_workers" in line for line in lines)


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_was_killed(start, tmp_path):
    """Killed after two of four sets: their rows stay as they are, and the others are those of a run without a kill."""
    for name, count in (("a", 9), ("b", 26), ("c", 5), ("d", 1)):
        write_set(tmp_path / "sets" / name, [i % 6 for i in range(count)])
    killed = start(fault="between")
    assert killed.processes[1].wait(TIMEOUT) == 2, killed.said()
    before = rows_of(tmp_path)
    assert [row["key"] for row in before] == ["a", "b"]
    again = start()
    assert again.wait(TIMEOUT) == [0, 0], again.said()
    rows = rows_of(tmp_path)
    assert rows[:2] == before  # also their seconds
    (tmp_path / "results.jsonl").unlink()
    whole = start(count=1)
    assert whole.wait(TIMEOUT) == [0], whole.said()
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in rows_of(tmp_path)]
