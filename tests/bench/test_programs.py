"""The programs in tests/benchmarks import what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import REPO

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
IMPORT = """
import importlib, pathlib, sys
for path in sorted(pathlib.Path(sys.path[1]).glob("*.py")):
    print(path.name, flush=True)
    assert importlib.import_module(path.stem).__doc__
"""


def test_they_import():
    """In a process of their own, one after the other; the last name printed is that of the one that does not."""
    environment = {"PYTHONPATH": f"{BENCHMARKS}:{REPO}", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
