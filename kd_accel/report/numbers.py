"""How the metrics of results.jsonl are written and compared: shares in percent, others as they are."""

from __future__ import annotations

from typing import Any

# Metrics that are no shares, by the end of their name: 1, higher is better; -1, lower is better; 0, neither.
PLAIN = {
    "mean_rank": -1,
    "modality_gap": -1,
    "self_similarity": 0,
    "feature_std": 0,
    "similarity": 1,
    "cosine": 1,
    "cka": 1,
    "rand_index": 1,
    "mutual_info": 1,
}


def direction(metric: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where neither is."""
    return next((better for ending, better in PLAIN.items() if metric.endswith(ending)), 1)


def is_share(metric: str, value: float) -> bool:
    """Whether it lies between 0 and 1 by its meaning, and is shown in percent."""
    return not metric.endswith(tuple(PLAIN)) and 0 <= value <= 1


def best(metric: str, values: list[float | None]) -> float | None:
    """The best of several numbers; None where there is nothing to compare."""
    known = [value for value in values if value is not None]
    better = direction(metric)
    return max(known, key=lambda value: better * value) if better and len(known) > 1 else None


def written(metric: str, value: float | None) -> str:
    """A share of 0.153 as 15.3, another number as it is, None as a dash."""
    if value is None:
        return "\N{EN DASH}"
    return f"{100 * value:.1f}" if is_share(metric, value) else f"{value:,.4g}"


def unit(metric: str, values: list[float | None]) -> str:
    """What stands beside the metric's name: "%" for shares."""
    return " %" if all(is_share(metric, value) for value in values if value is not None) else ""


def number(value: Any) -> float | None:
    """A metric's value, None for null and for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
