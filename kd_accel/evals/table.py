"""Rows of results.jsonl as people read them on a terminal."""

from __future__ import annotations

from kd_accel.evals.aggregate import aggregates
from kd_accel.evals.plan import OF_IMAGES
from kd_accel.evals.results import Row

CLASSIFICATION = ("acc1", "acc5", "mean_per_class_recall")
SHOWN = {  # of each kind of row: the metrics that the table has room for
    "zero_shot": CLASSIFICATION,
    "retrieval": tuple(f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10)),
    "winogavil": ("avg_jaccard_score", "jaccard_score_10-12"),
} | dict.fromkeys(OF_IMAGES, CLASSIFICATION)
ASKED = ("acc_seen", "acc_unseen", "harmonic_mean")  # shown where a row has them: seen_classes was given


def in_words(row: Row) -> str:
    """One line about a row."""
    shown = {name: row["metrics"].get(name) for name in _shown([row])}
    metrics = ", ".join(f"{name} {_percent(value)} %" for name, value in shown.items() if value is not None)
    kind = row["task"].replace("_", " ") + " " if row["task"] in OF_IMAGES else ""
    return f"{row['dataset']}: {kind}{metrics}; {row['n']} images" + (
        f", {row['bad']} unreadable" if row["bad"] else ""
    )


def table(rows: list[Row]) -> str:
    """The rows in aligned columns, metrics in percent; the sets of each kind under one head."""
    kinds = dict.fromkeys(row["task"] for row in rows)
    return "\n\n".join(_table_of([row for row in rows if row["task"] == kind]) for kind in kinds)


def averages(rows: list[Row]) -> str:
    """A line for every average whose tasks are all there, each with its end of line."""
    return "".join(f"{name}: {_percent(value)} %\n" for name, value in aggregates(rows).items() if value is not None)


def _table_of(rows: list[Row]) -> str:
    """Of rows of one kind."""
    metrics = _shown(rows)
    heads = [f"{metric} %".replace("_retrieval_recall@", " R@") for metric in metrics]  # six long names fill no screen
    lines = [[rows[0]["task"], "images", "unreadable", *heads]]
    for row in rows:
        values = [_percent(row["metrics"].get(metric)) for metric in metrics]
        lines.append([row["dataset"], str(row["n"]), str(row["bad"]), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _shown(rows: list[Row]) -> list[str]:
    """The metrics of rows of one kind that people are shown."""
    asked = [metric for metric in ASKED if any(metric in row["metrics"] for row in rows)]
    return [*SHOWN[rows[0]["task"]], *asked]


def _aligned(cells: list[str], widths: list[int]) -> str:
    """The first cell to the left, the numbers to the right."""
    first, *numbers = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *numbers])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
