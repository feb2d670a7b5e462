"""Averages over tasks: DataComp's, those of FastCLIP and TempNet (IN & Variants), ProtoCLIP's and COCO's.

Tasks are found by key, never by counting rows: a results file may have rows of other tasks, and several of one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from kd_accel.evals.tasks import IMAGENET_SHIFTS, SUITES, TASKS
from kd_accel.text_files import replace_text

Row = dict[str, Any]  # of results.jsonl


@dataclass(frozen=True)
class Average:
    """The mean of some metrics over some tasks."""

    keys: tuple[str, ...]
    metrics: tuple[str, ...] = ("main_metric",)


AVERAGES = {
    "ImageNet": Average(SUITES["imagenet"]),
    "ImageNet dist. shifts": Average(IMAGENET_SHIFTS),
    "IN & Variants": Average(SUITES["imagenet_variants"]),
    "VTAB": Average(SUITES["vtab"]),
    "Retrieval": Average(SUITES["retrieval"]),
    "Average": Average(tuple(key for key in SUITES["datacomp38"] if TASKS[key].main_metric is not None)),  # 38
    "ProtoCLIP zero-shot": Average(SUITES["protoclip"], ("acc1",)),
    "COCO mean recall": Average(
        SUITES["coco"], tuple(f"{what}_retrieval_recall@{k}" for what in ("image", "text") for k in (1, 5, 10))
    ),
}


def aggregates(rows: Iterable[Row]) -> dict[str, float | None]:
    """Every average (0..1) over the rows of one model at one step; None where `missing` names a task.

    The last row of a task counts; rows of other tasks and of other kinds of evaluation (linear probes) do not.
    """
    found = _by_key(rows)
    absent = missing(found.values())
    return {
        name: None if absent[name] else fmean(found[key]["metrics"][m] for key in average.keys for m in average.metrics)
        for name, average in AVERAGES.items()
    }


def missing(rows: Iterable[Row]) -> dict[str, list[str]]:
    """By the name of the average: the keys of its tasks that have no row, or no number in it."""
    found = _by_key(rows)
    return {
        name: [key for key in average.keys if not _has(found.get(key), average.metrics)]
        for name, average in AVERAGES.items()
    }


def write_aggregates(rows: Iterable[Row], folder: Path) -> None:
    """Write folder/aggregate.json: for every model in `rows` of results.jsonl, its step, weights, aggregates, missing.

    `missing` has the averages that lack some of their tasks, not those that lack all. Called on the main rank.
    """
    models: dict[tuple, list[Row]] = {}
    for row in rows:
        models.setdefault((row["model"], row["step"], row.get("weights")), []).append(row)
    entries = [dict(zip(("model", "step", "weights"), who, strict=True)) | _entry(own) for who, own in models.items()]
    replace_text(folder / "aggregate.json", json.dumps(entries, indent=2) + "\n")


def _entry(rows: list[Row]) -> dict[str, dict]:
    lacking = {name: keys for name, keys in missing(rows).items() if 0 < len(keys) < len(AVERAGES[name].keys)}
    return {"aggregates": aggregates(rows), "missing": lacking}


def _by_key(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of every known task, of the kind by which the task is averaged."""
    known = (row for row in rows if row.get("key") in TASKS)  # a set that is no task has none
    return {row["key"]: row for row in known if row["task"] == TASKS[row["key"]].kind}


def _has(row: Row | None, metrics: tuple[str, ...]) -> bool:
    return row is not None and all(row["metrics"].get(metric) is not None for metric in metrics)
