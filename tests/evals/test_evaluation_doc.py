"""docs/evaluation.md and configs/eval say what the tables of the package say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kd_accel.cli import parse
from kd_accel.config_files import load
from kd_accel.eval_config import EvalConfig
from kd_accel.evals.aggregate import AVERAGES
from kd_accel.evals.tasks import SUITES, TASKS, expand

REPO = Path(__file__).resolve().parent.parent.parent
DOC = (REPO / "docs/evaluation.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
LETTERS = {"i": "imagenet_variants", "r": "retrieval", "v": "vtab", "d": "datacomp38", "p": "protoclip", "c": "coco"}


def rows(title: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head; code marks are dropped."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOC, re.MULTILINE | re.DOTALL)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tasks_are_those_of_the_package():
    """Key, title, main metric and suites of each, in one order; `imagenet` is part of imagenet_variants."""
    documented = [
        (key, title, metric, {LETTERS[x] for x in suites.split()}) for key, title, metric, suites in rows("Tasks")
    ]
    assert documented == [
        (
            task.key,
            task.title,
            task.main_metric or "none",
            {suite for suite in SUITES if suite != "imagenet" and task.key in SUITES[suite]},
        )
        for task in TASKS.values()
    ]


def test_the_suites_are_those_of_the_package():
    assert [(suite, config) for suite, _, _, config in rows("Suites")] == [
        (suite, f"configs/eval/{suite}.yaml") for suite in SUITES
    ]


def test_the_averages_are_those_of_the_package():
    assert [name for name, _ in rows("Averages")] == list(AVERAGES)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command, monkeypatch):
    monkeypatch.chdir(REPO)
    program, *words = shlex.split(command, comments=True)
    assert program == "kd-accel"
    assert parse(words)[0] == words[0]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_its_config(suite):
    """A file of its name, that asks for nothing else and says in a comment how it is run."""
    path = REPO / f"configs/eval/{suite}.yaml"
    config = load(EvalConfig, [path], model="runs/NAME")
    assert expand(config.tasks) == expand([suite])
    assert f" eval runs/NAME configs/eval/{suite}.yaml\n" in path.read_text(encoding="utf-8")


def test_no_config_is_without_a_suite():
    assert {path.stem for path in (REPO / "configs/eval").iterdir()} == set(SUITES)
