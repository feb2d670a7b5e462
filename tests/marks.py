"""Marks for the cases of a test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[Any], cases: Iterable[Any]) -> list:
    """All cases; those that are not `kept` are slow."""
    kept = list(kept)
    return [case if case in kept else _slow(case) for case in cases]


def _slow(case: Any):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
