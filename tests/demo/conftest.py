"""The demo's rows, as they are drawn from scikit-learn's digits."""

from __future__ import annotations

import pytest

from kd_accel.demo import digits


@pytest.fixture(scope="session")
def rows():
    return digits.load_digits()
