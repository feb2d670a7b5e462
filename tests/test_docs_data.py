"""docs/data.md: its YAML is valid, its command parses, and every default it names is the one that the code takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kd_accel.config_files import load
from kd_accel.data.tables import FORMATS
from kd_accel.data_config import DataConfig
from kd_accel.pack_config import PackConfig
from kd_accel.schema import validate

DOC = (Path(__file__).resolve().parent.parent / "docs/data.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```yaml\n(.*?)```", DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_its_yaml_is_valid(line):
    validate(DataConfig, yaml.safe_load(line)["data"] | {"batch_size": 1})


def test_its_command_parses():
    (words,) = re.findall(r"^kd-accel pack (.*)$", DOC, re.M)
    assert load(PackConfig, [], words.split()).short_side == 288


def test_its_default_columns_are_those_of_the_code():
    """Every extension, in its row of the table of files."""
    rows = re.findall(r"^\| (`\..*?) \| (.*?) \|", DOC, re.M)
    told = {extension: columns for files, columns in rows for extension in re.findall(r"`(\.\w+)`", files)}
    code = {extension: f"`{image}`, `{caption}`" for extension, (_, image, caption) in FORMATS.items()}
    assert told == code | {".txt": "no image, the line"}
