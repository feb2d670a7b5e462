"""What a run's environment.json says."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kd_accel.environment import write_environment


def test_environment_explains_a_number_and_names_nobody(tmp_path):
    """Versions and hardware are recorded; no path of this machine and no home directory is."""
    write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    environment = json.loads(text)
    assert torch.__version__.startswith(environment["packages"]["torch"])  # which lacks the build, as in +cu130
    assert environment["world_size"] == 1
    assert str(Path.home()) not in text
    assert str(Path(__file__).resolve().parents[1]) not in text
