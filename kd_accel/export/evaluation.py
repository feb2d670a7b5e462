"""The table of a card: the main metric of every task of the released step, beside the teachers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd_accel.evals.results import RESULTS, Row, read_results
from kd_accel.export.origin import Origin
from kd_accel.report.columns import kind_of, main_name, main_value, task_of
from kd_accel.report.numbers import unit, written
from kd_accel.report.runs import run_of


def evaluation_table(origin: Origin) -> str | None:
    """Markdown; None for a step that was not evaluated. A teacher counts where it was measured on the same samples."""
    rows = read_results(origin.run / RESULTS)
    ours = [row for row in rows if row["step"] == origin.step and row["model"] == origin.run.name]
    ours = [row for row in ours if main_value(row) is not None]
    if not ours:
        return None
    found = dict(_teacher(section, rows) for section in origin.teachers.values())
    teachers = {title: rows for title, rows in found.items() if any(_same(row, rows) for row in ours)}
    head = ["data", "task", "metric", "this model", *(f"{title} (teacher)" for title in teachers), "samples"]
    lines = [head, ["---"] * len(head), *(_line(row, list(teachers.values())) for row in ours)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _teacher(section: dict[str, Any], rows: list[Row]) -> tuple[str, list[Row]]:
    """(its name, its rows, oldest first): of those of the run's own results that are its, and of its own results."""
    if section.get("path"):
        home = run_of(Path(section["path"]))
        title, rows = home.name, [*rows, *read_results(home / RESULTS)]
    else:
        title = ",".join(filter(None, (section.get("arch"), section.get("pretrained"))))
    return title, sorted((row for row in rows if row["model"] == title), key=lambda row: row["step"] or 0)


def _same(row: Row, rows: list[Row]) -> Row | None:
    """The newest of `rows` with the task and the samples of `row`."""
    return next((r for r in reversed(rows) if (*task_of(r), r["n"]) == (*task_of(row), row["n"])), None)


def _line(row: Row, teachers: list[list[Row]]) -> list[str]:
    theirs = [_same(row, rows) for rows in teachers]
    metric = main_name([row, *filter(None, theirs)])
    values = [_value(metric, main_value(row))]
    values += [_value(metric, None if other is None else main_value(other)) for other in theirs]
    return [row["dataset"], kind_of(task_of(row)), metric, *values, f"{row['n']:,}"]


def _value(metric: str, value: float | None) -> str:
    return written(metric, value) + ("" if value is None else unit(metric))
