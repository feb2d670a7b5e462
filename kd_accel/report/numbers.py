"""How the metrics of results.jsonl are written and compared: shares in percent, others as they are."""

from __future__ import annotations

import re
from typing import Any

from kd_accel.evals.coco_keys import PERCENT

# Metrics that are no shares of 0..1, and whether higher is better (1), lower is (-1), or neither (0).
PLAIN = {
    r".*_mean_rank": -1,
    r"modality_gap": -1,
    r"positive_pair_similarity": 1,
    r".*_self_similarity|.*_feature_std": 0,
    r"adjusted_.*": 1,  # Rand index and mutual information may be negative
    r"teacher_.*(cosine|cka)": 1,
    r"c|count_.*": 0,  # of a linear probe; images of a group
}
NEITHER = r"toxicity_.*"  # shares of which no one says what is best


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither is."""
    if re.fullmatch(NEITHER, metric):
        return 0
    return next((better for pattern, better in PLAIN.items() if re.fullmatch(pattern, metric)), 1)


def is_share(metric: str) -> bool:
    """Whether it lies between 0 and 1 by its meaning, and is written in percent."""
    return metric not in PERCENT and not re.fullmatch("|".join(PLAIN), metric)


def unit(metric: str) -> str:
    """What stands behind the metric's name: a percent sign, or nothing."""
    return "\N{NO-BREAK SPACE}%" if is_share(metric) or metric in PERCENT else ""


def best(metric: str, values: list[float | None]) -> float | None:
    """The best of several numbers; None where there is nothing to compare."""
    known = [value for value in values if value is not None]
    better = direction(metric)
    return max(known, key=lambda value: better * value) if better and len(known) > 1 else None


def written(metric: str, value: float | None) -> str:
    """A share of 0.153 as 15.3, another number as it is, None as a dash."""
    if value is None:
        return "\N{EN DASH}"
    if unit(metric):
        return f"{100 * value if is_share(metric) else value:.1f}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def number(value: Any) -> float | None:
    """A metric's value, None for null and for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
