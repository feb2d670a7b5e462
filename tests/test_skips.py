"""A skip is a failure where KD_ACCEL_MAY_SKIP, which CI sets, does not allow its reason."""

from __future__ import annotations

import sys

import pytest
from conftest import run_process

TESTS = """
import pytest

@pytest.mark.skip(reason="no GPU")
def test_a_kernel(): ...

def test_a_chart():
    pytest.importorskip("a_package_that_is_missing", reason="pip install a-package")
"""


@pytest.mark.parametrize("more", [[], ["-n", "1"]], ids=["alone", "workers"])
@pytest.mark.parametrize(("allowed", "code"), [("", 0), ("no GPU|pip install", 0), ("no GPU", 1)])
def test_reasons_that_are_not_allowed_fail(tmp_path, allowed, code, more):
    (tmp_path / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", *more, str(tmp_path)]
    out = run_process(command, env={"KD_ACCEL_MAY_SKIP": allowed}, code=code, cold=True)
    assert "2 skipped" in out
    assert ("does not allow: pip install a-package" in out) == (code == 1)
    assert "does not allow: no GPU" not in out
