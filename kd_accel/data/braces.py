"""Brace ranges in the config: "{00000..00139}.tar" names 140 files."""

from __future__ import annotations

from collections.abc import Sequence

from braceexpand import UnbalancedBracesError, braceexpand

from kd_accel.data.urls import is_remote, shown
from kd_accel.schema import ConfigError


def expand_braces(entries: str | Sequence[str], key: str) -> list[str]:
    """What `entries` name, in order. Raises ConfigError, which begins with `key`, for braces that do not match."""
    names: list[str] = []
    for entry in [entries] if isinstance(entries, str) else entries:
        try:
            names += braceexpand(entry)
        except UnbalancedBracesError:
            raise ConfigError(f"{key}: unbalanced braces in {shown(entry) if is_remote(entry) else entry}") from None
    return names
