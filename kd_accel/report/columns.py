"""The rows of results.jsonl as columns: one per evaluated model, with the newest row of each of its tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kd_accel.evals.plan import OF_IMAGES
from kd_accel.report.numbers import number
from kd_accel.report.runs import Run, teachers_among

Task = tuple[str, str]  # key and kind: one set may be there for zero_shot and for linear_probe
Row = dict[str, Any]
# the other kinds have a name without a gap
KINDS = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "class_head": "class head"}


@dataclass(frozen=True, eq=False)
class Column:
    """One model of one run; a results.jsonl may hold several, written with output=."""

    run: Run
    model: str
    label: str
    history: list[Row]  # all of its rows, oldest step first
    rows: dict[Task, Row]  # the newest of each task
    step: int | None  # the newest that was evaluated; None: a release
    teachers: frozenset[int]  # numbers of the runs, of those on the page, that this model learned from
    teaches: bool  # another run on the page learned from it

    @property
    def averages(self) -> dict[str, float | None]:
        """Of its step, from aggregate.json, by name."""
        entries = [entry for entry in self.run.aggregates if (entry["model"], entry["step"]) == (self.model, self.step)]
        return entries[-1]["aggregates"] if entries else {}

    def value(self, task: Task) -> float | None:
        """Its main metric, None where the task is missing or has none."""
        return main_value(self.rows[task]) if task in self.rows else None


def columns_of(runs: list[Run]) -> list[Column]:
    """Teachers first, otherwise in the order of the runs."""
    taught_by = {
        run.number: frozenset(teacher.number for teacher in teachers_among(run, runs).values()) for run in runs
    }
    teaching = frozenset().union(*taught_by.values())
    columns = [
        _column(run, model, teachers=taught_by[run.number], teaches=run.number in teaching)
        for run in runs
        for model in dict.fromkeys(row["model"] for row in run.results)
    ]
    return sorted(columns, key=lambda column: not column.teaches)


def teacher_of(column: Column, columns: list[Column]) -> Column | None:
    """The one among `columns` that it learned from; None without any, and with several."""
    found = [other for other in columns if other.run.number in column.teachers]
    return found[0] if len(found) == 1 else None


def _column(run: Run, model: str, *, teachers: frozenset[int], teaches: bool) -> Column:
    history = sorted((row for row in run.results if row["model"] == model), key=_age)
    alone = len({row["model"] for row in run.results}) == 1
    return Column(
        run=run,
        model=model,
        label=run.name if alone else f"{run.name}: {model}",
        history=history,
        rows={task_of(row): row for row in history},  # of one age, the later line
        step=history[-1]["step"],
        teachers=teachers,
        teaches=teaches,
    )


def _age(row: Row) -> float:
    return math.inf if row["step"] is None else row["step"]


def tasks_of(columns: list[Column]) -> dict[Task, list[Row | None]]:
    """The row of each column, or None, by task; in the order in which they were evaluated."""
    tasks = dict.fromkeys(task for column in columns for task in column.rows)
    return {task: [column.rows.get(task) for column in columns] for task in tasks}


def task_of(row: Row) -> Task:
    """What tells the tasks of a model apart."""
    return row["key"], row["task"]


def kind_of(task: Task) -> str:
    """What the page calls it."""
    return KINDS.get(task[1], task[1])


def main_value(row: Row) -> float | None:
    """Of the main metric, None where it has none or is not finite."""
    return number(row["metrics"].get("main_metric"))


def main_name(rows: list[Row]) -> str:
    """Which of the metrics is the main one of a task: the first that has its value in all rows; "" without a value."""
    scored = [row for row in rows if main_value(row) is not None]
    names = [name for row in scored[:1] for name in row["metrics"] if name != "main_metric"]
    return next((name for name in names if all(row["metrics"].get(name) == main_value(row) for row in scored)), "")


def mean_of_common(columns: list[Column]) -> tuple[list[Task], list[float]]:
    """The tasks for which every column has a main metric, and each column's mean of them; no means without tasks.

    Linear probes and class heads measure something else, and do not count.
    """
    tasks = [task for task in tasks_of(columns) if task[1] not in OF_IMAGES]
    common = [task for task in tasks if all(column.value(task) is not None for column in columns)]
    means = [sum(column.value(task) for task in common) / len(common) for column in columns] if common else []
    return common, means
