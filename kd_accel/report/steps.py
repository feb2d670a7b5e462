"""How the main metrics moved over a run's checkpoints, where several of them were evaluated."""

from __future__ import annotations

import numpy as np

from kd_accel.report.columns import Column, Task, kind_of, main_value, task_of, tasks_of
from kd_accel.report.page import figures, fold, note
from kd_accel.report.pictures import Curve, Line

SHOWN = 6  # panels; the others are folded

Values = dict[int, float]  # step -> main metric


def step_curves(columns: list[Column]) -> list[Curve]:
    """A panel for every task that some model was evaluated on at several steps; before several of them, their mean."""
    tasks = {task: [_values(column, task) for column in columns] for task in tasks_of(columns)}
    several = {task: values for task, values in tasks.items() if max(map(len, values)) > 1}
    if not several:
        return []
    panels = [Curve(_title(columns, task), _lines(columns, values)) for task, values in several.items()]
    means = [_mean([values[i] for values in several.values()]) for i in range(len(columns))]
    if len(several) > 1 and max(map(len, means)) > 1:
        panels.insert(0, Curve(f"mean of {len(several)} tasks", _lines(columns, means)))
    return panels


def over_steps(panels: list[Curve]) -> str:
    """The panels as HTML; empty without any."""
    if not panels:
        return ""
    shown, folded = panels[:SHOWN], panels[SHOWN:]
    more = fold(f"{len(folded)} more tasks over steps", figures(folded, {})) if folded else ""
    words = note("Main metrics. A teacher that was evaluated at one step alone is a level line.")
    return f"<h3>Over steps</h3>{words}{figures(shown, {})}{more}"


def _values(column: Column, task: Task) -> Values:
    """Of one age, the later line counts."""
    rows = [row for row in column.history if task_of(row) == task and main_value(row) is not None]
    return {row["step"]: main_value(row) for row in rows if row["step"] is not None}


def _mean(by_task: list[Values]) -> Values:
    """At the steps that have all tasks."""
    common = sorted(set(by_task[0]).intersection(*by_task))
    return {step: sum(values[step] for values in by_task) / len(by_task) for step in common}


def _title(columns: list[Column], task: Task) -> str:
    row = next(column.rows[task] for column in columns if task in column.rows)
    return f"{row['dataset']}, {kind_of(task)}"


def _lines(columns: list[Column], values: list[Values]) -> list[Line]:
    all_steps = [step for known in values for step in known]
    lines = []
    for column, known in zip(columns, values, strict=True):
        if column.teaches and len(known) == 1:
            known = dict.fromkeys((min(all_steps), max(all_steps)), *known.values())
        if known:
            steps = sorted(known)
            heights = np.array([known[step] for step in steps], dtype=np.float64)
            lines.append(Line(column.label, column.run.number, np.array(steps), heights))
    return lines
