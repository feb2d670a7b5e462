"""docs/evaluation_sets.md: its commands are valid, and the signs, sets and places it names are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kd_accel.config_files import load
from kd_accel.evals.captions_json import FILES
from kd_accel.evals.find import find_task
from kd_accel.evals.image_folder import SPLITS
from kd_accel.evals.tars import MARKERS
from kd_accel.evals.torchvision_sets import SETS
from kd_accel.evals.winogavil_set import CSV, CSV_IMAGES, QUESTIONS
from kd_accel.prepare_config import PrepareConfig

DOC = (Path(__file__).resolve().parents[2] / "docs/evaluation_sets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", re.findall(r"^kd-accel eval prepare (.*)$", DOC, re.M))
def test_its_commands_are_valid(command):
    source, *values = command.split()
    assert load(PrepareConfig, [], values, source=source).source == source


def test_it_names_every_sign():
    told = set(re.findall(r"`([^`]+)`", DOC))
    signs = {*MARKERS, CSV, CSV_IMAGES + "/", QUESTIONS, *(set(FILES) - {"annotations/captions_val2014.json"})}
    assert signs <= told
    assert set(SPLITS["test"]) - {"test"} <= told


def test_it_names_every_set_of_torchvision():
    listed = " ".join(DOC.split()).replace("-", "").replace(" ", "").lower()
    others = {"CIFAR100": "100", "FGVCAircraft": "fgvcaircraft", "StanfordCars": "stanfordcars"}
    assert all(others.get(s.kind.__name__, s.kind.__name__.lower()) in listed for s in SETS)


def test_the_places_of_a_task():
    sentence = re.search(r"Of the task `vtab/cifar100`.*?\. ", DOC, re.S)[0]
    assert re.findall(r"`([^`]+)`", sentence.partition(": ")[2]) == find_task("vtab/cifar100", [Path(".")])
