"""Progress bars of evaluation: on the main rank's terminal, where a person watches, and never in a log file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from kd_accel import distributed


def bar(items: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm's, with its options; gone when it is done. Without `items` it counts by update()."""
    return tqdm(items, leave=False, disable=None if distributed.is_main() else True, **options)
