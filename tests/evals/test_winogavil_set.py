"""WinoGAViL's two layouts: pictures once, questions as rows of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from kd_accel.data.transforms import decode
from kd_accel.evals.winogavil import Association
from kd_accel.evals.winogavil_set import open_winogavil
from kd_accel.schema import ConfigError

NAMES = ["bison", "beard", "shave.2", "flea"]
QUESTIONS = [
    ("pogonophile", ["flea", "beard", "shave.2"], ["beard", "shave.2"]),
    ("herd", ["bison", "flea"], ["bison"]),
]


@pytest.fixture
def tars(tmp_path, write_tar, picture) -> Path:
    """As `eval prepare` writes it: keys instead of names, in two tars."""
    keys = {name: f"{i:07d}" for i, name in enumerate(NAMES)}
    samples = {key: {"png": picture(i), "txt": name.encode()} for i, (name, key) in enumerate(keys.items())}
    for number, part in enumerate((NAMES[:3], NAMES[3:])):
        write_tar(tmp_path / "wino" / "test" / f"{number}.tar", {keys[name]: samples[keys[name]] for name in part})
    (tmp_path / "wino" / "test" / "nshards.txt").write_text("2\n")
    lines = [
        {"cue": c, "candidates": [keys[n] for n in cs], "associations": [keys[n] for n in a]} for c, cs, a in QUESTIONS
    ]
    (tmp_path / "wino" / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "wino"


@pytest.fixture
def table(tmp_path, picture) -> Path:
    """As the authors publish it."""
    folder = tmp_path / "wino"
    (folder / "winogavil_images").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (folder / "winogavil_images" / f"{name}.jpg").write_bytes(picture(i))
    with (folder / "winogavil_dataset.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ID", "candidates", "cue", "associations", "num_candidates"])
        for i, (cue, candidates, associations) in enumerate(QUESTIONS):
            rows.writerow([i, json.dumps(candidates), cue, json.dumps(associations), len(candidates)])
    return folder


def test_tars(tars, picture):
    found = open_winogavil(tars)
    assert (found.name, found.kind) == ("wino", "winogavil")
    samples = found.samples()
    assert [sample.key for sample in samples] == ["0000000", "0000001", "0000002", "0000003"]
    assert found.image(samples[3]).tobytes() == decode(picture(3)).tobytes()
    assert found.questions() == [Association("pogonophile", (3, 1, 2), (1, 2)), Association("herd", (0, 3), (0,))]


def test_the_authors_table(table, picture):
    """The same questions, with pictures in the order of their names."""
    found = open_winogavil(table, name="misc/winogavil")
    samples = found.samples()
    assert [sample.key for sample in samples] == sorted(NAMES)  # beard bison flea shave.2
    assert found.image(samples[2]).tobytes() == decode(picture(3)).tobytes()
    assert found.questions() == [Association("pogonophile", (2, 0, 3), (0, 3)), Association("herd", (1, 2), (1,))]


def test_no_sign_of_the_layout(tmp_path, tars):
    assert open_winogavil(tmp_path) is None
    assert open_winogavil(tars, split="train") is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "questions.jsonl: cannot be read"),
        ("[]", "questions.jsonl, line 1: TypeError"),
        ('{"cue": "x", "candidates": ["0000000"]}', "line 1: KeyError: 'associations'"),
        ('{"cue": " ", "candidates": ["0000000"], "associations": ["0000000"]}', "needs a cue"),
        ('{"cue": "x", "candidates": ["0000000"], "associations": []}', "not among the candidates"),
        ('{"cue": "x", "candidates": ["0000000"], "associations": ["0000001"]}', "not among the candidates"),
        ('{"cue": "x", "candidates": ["9"], "associations": ["9"]}', "the set has no picture '9'"),
        ("\n", "questions.jsonl: no questions"),
    ],
)
def test_a_bad_question_names_its_line(tars, line, said):
    (tars / "questions.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=said):
        open_winogavil(tars).questions()


def test_a_table_that_is_none(table):
    (table / "winogavil_dataset.csv").write_text("cue,associations\nx,[]\n")
    with pytest.raises(ConfigError, match="line 2: KeyError: 'candidates'"):
        open_winogavil(table).samples()
    (table / "winogavil_dataset.csv").write_text("cue,candidates,associations\nx,[1,[]\n")
    with pytest.raises(ConfigError, match="winogavil_dataset.csv: cannot be read"):
        open_winogavil(table).samples()


def test_tars_that_are_not_there(tars):
    (tars / "test" / "1.tar").unlink()
    with pytest.raises(ConfigError, match=r"1\.tar: no such file"):
        open_winogavil(tars).samples()
    (tars / "test" / "nshards.txt").write_text("many")
    with pytest.raises(ConfigError, match="expected the number of tars"):
        open_winogavil(tars).samples()
    (tars / "test" / "nshards.txt").write_text("0")
    with pytest.raises(ConfigError, match="no pictures"):
        open_winogavil(tars).samples()
