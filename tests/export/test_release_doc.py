"""docs/release.md: its commands are valid, and the limits are those that are checked."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from kd_accel.cli import parse
from kd_accel.export.parity import BATCHES, LIMITS, TEXTS

DOC = (Path(__file__).resolve().parents[2] / "docs/release.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    program, verb, *words = shlex.split(command.rpartition("| ")[2], comments=True)
    assert (program, parse([verb, *words])[0]) == ("kd-accel", verb)


def test_what_is_compared_is_as_the_page_says():
    assert (BATCHES, len(TEXTS)) == ((1, 2, 5), 5)
    assert LIMITS == {"open_clip": 0, "transformers": 1e-5, "onnx": 1e-4, "int8": 0.01}
