"""Evaluation on several processes gives the rows of one, to the last bit, and a mistake ends all of them."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import run_process
from PIL import Image

pytestmark = pytest.mark.distributed


def write_set(folder: Path, truths: list[int] | list[str], *, broken: int | None = None) -> Path:
    """Random pictures with a class index each, or with captions; the picture number `broken` is none."""
    zero_shot = isinstance(truths[0], int)
    (folder / "test").mkdir(parents=True)
    with tarfile.open(folder / "test/0.tar", "w") as tar:
        for i, truth in enumerate(truths):
            file = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(file, "PNG")
            tiny.add(tar, f"{i}.png", b"junk" if i == broken else file.getvalue())
            tiny.add(tar, f"{i}.{'cls' if zero_shot else 'txt'}", str(truth).encode())
    (folder / "test/nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("classification" if zero_shot else "retrieval")
    (folder / "classnames.txt").write_text("\n".join(f"thing {i}" for i in range(6)))
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}")
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "untrained")


def test_rows_are_those_of_one_process(tmp_path, release, run_ranks):
    """results.jsonl is equal byte for byte: uneven shares, broken images, several captions, fewer images than ranks."""
    captions = ["\n".join(f"{j} of {i}" for j in range(1 + i % 3)) for i in range(21)]
    write_set(tmp_path / "sets" / "classes", [i % 6 for i in range(26)], broken=5)
    write_set(tmp_path / "sets" / "captions", captions, broken=20)
    write_set(tmp_path / "sets" / "one_image", ["a picture\nof nothing"])
    command = ["-m", "kd_accel", "eval", str(release), f"data={tmp_path / 'sets'}", "batch_size=4", "num_workers=1"]
    output = run_ranks([*command, f"output={tmp_path / 'two'}"], nproc=2)
    run_process([sys.executable, *command, f"output={tmp_path / 'one'}"])
    one, two = (re.sub(r', "seconds": [\d.]+', "", (tmp_path / name).read_text()) for name in ("one", "two"))
    assert two == one
    assert [f'"n": {n}, "bad": {bad}' in one for n, bad in ((25, 1), (20, 1), (1, 0))] == [True] * 3
    assert output.count("classes: acc1") == output.count("left out 1 unreadable of 26 images") == 1  # one rank speaks


def test_a_set_that_nobody_can_read_ends_every_rank(tmp_path, release):
    """Known to the rank that decodes it alone, said by rank 0, and nobody waits for the other."""
    write_set(tmp_path / "set", ["a", "b"], broken=0)
    write_set(tmp_path / "junk", ["a"], broken=0)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    values = [f"data=[{tmp_path / 'set'}, {tmp_path / 'junk'}]", "num_workers=0", f"output={tmp_path / 'rows'}"]
    output = run_process([*launcher, "-m", "kd_accel", "eval", str(release), *values], code=1)
    said = [line for line in output.splitlines() if line.startswith("error: ")]  # the launcher repeats it, indented
    assert len(said) == 1
    assert "none of its 1 images is readable" in output
    assert len((tmp_path / "rows").read_text().splitlines()) == 1  # the row of the set before it is kept


GATHER = """
import torch
from kd_accel import distributed, processes
from kd_accel.evals.features import deal
processes.start_process_group(60)
rank = distributed.rank()
given = {"ids": 2 * rank + torch.arange(2.0), "rows": torch.full((2, 3), float(rank)), "cubes": torch.ones(2, 3, 4)}
found = distributed.gather_rows(given)
assert found["ids"].tolist() == [0, 1, 2, 3, 4, 5]
assert found["rows"][:, 2].tolist() == [0, 0, 1, 1, 2, 2]
assert found["cubes"].shape == (6, 3, 4) and found["cubes"].eq(1).all()
mine = torch.full(([2, 0, 3][rank], 2), float(rank))
assert distributed.gather_uneven_rows(mine)[:, 1].tolist() == [0, 0, 2, 2, 2]
assert distributed.gather_uneven_rows(mine.long()[:, 0]).tolist() == [0, 0, 2, 2, 2]
assert distributed.gather_uneven_rows(mine[:0]).shape == (0, 2)
assert deal(10, 3) == [[range(0, 3), range(9, 10)], [range(3, 6)], [range(6, 9)]]  # the same batches as alone
processes.end_process(0)
"""


def test_rows_are_gathered_in_rank_order(tmp_path, run_ranks):
    """Of several shapes at once; two, none and three; none at all. Whole batches are dealt, whatever the ranks."""
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    run_ranks(script, nproc=3)
