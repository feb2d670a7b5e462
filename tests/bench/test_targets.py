"""The table of tests/benchmarks/targets.py: what is missed says so, and what was not run is a dash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import targets
from conftest import REPO

BENCHMARKS = Path(targets.__file__).parent


def write(folder: Path, target: targets.Target, factor: float) -> None:
    """Numbers of the target's part: `factor` times its limit."""
    limit = float(target.asked.split()[1])
    found: dict = {}
    for path, value in ((target.number, factor * limit), (target.over, 1.0)):
        if path is not None:
            node = found
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = value
    (folder / f"{target.part}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: f"{target.part}: {target.what}")
def test_the_table_says_what_is_missed(target, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "TARGETS", (target,))
    least = target.asked.startswith(">")
    assert targets.table(tmp_path)[0].endswith(" -")
    write(tmp_path, target, 1.0)
    assert "MISSED" not in targets.table(tmp_path)[0]
    write(tmp_path, target, 0.99 if least else 1.01)
    assert targets.table(tmp_path)[0].endswith("MISSED")
    write(tmp_path, target, 1.01 if least else 0.99)
    assert "MISSED" not in targets.table(tmp_path)[0]


def test_every_part_has_a_target_and_a_program():
    assert {target.part for target in targets.TARGETS} == set(targets.PARTS)
    programs = [word for words in targets.PARTS.values() for word in words.split() if word.startswith("{here}")]
    assert all(Path(word.format(here=BENCHMARKS)).is_file() for word in programs)


def test_a_part_that_fails_ends_the_run_and_names_its_log(tmp_path):
    """Here the pairs are not there."""
    words = [tmp_path / "out", "--pairs", tmp_path / "nothing", "--only", "data"]
    program = [sys.executable, str(BENCHMARKS / "targets.py"), *map(str, words)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 1
    assert done.stderr == f"data ended with 1: see {tmp_path}/out/data.log\n"
    assert (tmp_path / "out/data.log").stat().st_size > 0
