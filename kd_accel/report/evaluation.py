"""What the models can do: the main metric of every task side by side, and all metrics in a fold below it."""

from __future__ import annotations

from kd_accel.report.columns import (
    Column,
    Row,
    Task,
    columns_of,
    kind_of,
    main_name,
    main_value,
    mean_of_common,
    tasks_of,
    teacher_of,
)
from kd_accel.report.numbers import best, is_share, number, unit, written
from kd_accel.report.page import Section, breakable, escape, fold, missing, note, swatch, table
from kd_accel.report.runs import Run
from kd_accel.report.steps import over_steps, step_curves


def evaluation_section(runs: list[Run]) -> Section:
    """Rows = tasks, columns = models at their newest step."""
    absent = missing([run for run in runs if not run.results], "results.jsonl", "kd-accel eval RUN data=FOLDER")
    columns = columns_of(runs)
    if not columns:
        return Section("Evaluation", absent)
    panels = step_curves(columns)
    return Section("Evaluation", absent + _main_table(columns) + _all_metrics(columns) + over_steps(panels), panels)


# The main metrics ----------------------------------------------------------------------------------------------------


def _main_table(columns: list[Column]) -> str:
    body = "".join(_task_row(columns, task, rows) for task, rows in tasks_of(columns).items())
    head = f"<th scope=col>task</th>{''.join(map(_head, columns))}"
    averages = f"<tbody class=averages>{_averages(columns)}</tbody>"
    return _legend(columns) + table(head, f"{averages}<tbody>{body}</tbody>", caption="Main metric of every task")


def _averages(columns: list[Column]) -> str:
    """Those of the suites that were evaluated as a whole, and the mean over the tasks that all columns share."""
    names = dict.fromkeys(name for column in columns for name in column.averages)
    by_name = {(name, "average of the suite"): [column.averages.get(name) for column in columns] for name in names}
    common, means = mean_of_common(columns)
    if len(common) > 1:
        by_name[f"Mean of {len(common)} tasks", "main metrics, of the tasks that all have"] = means
    steps = [column.step for column in columns]
    return "".join(
        f"<tr><th scope=row>{escape(name)}<small>{what}</small></th>{_cells(columns, 'mean', values, steps)}</tr>"
        for (name, what), values in by_name.items()
        if any(value is not None for value in values)
    )


def _legend(columns: list[Column]) -> str:
    parts = ["The main metric of each task, shares in percent."]
    if len(_rivals(columns)) > 1:
        parts.append("Bold: the best" + (" of those that are no teacher." if _some_teach(columns) else "."))
    if any(teacher_of(column, columns) for column in columns):
        parts.append(
            "Below a student's number: its distance in points from its teacher's, and the share of it that it keeps."
        )
    return note(" ".join(parts))


def _head(column: Column) -> str:
    step = "release" if column.step is None else f"step {column.step:,}"
    role = "teacher, " if column.teaches else ""
    name = f"{swatch(column.run.number)}{breakable(column.label)}<small>{role}{step}</small>"
    return f"<th scope=col class=number>{name}</th>"


def _task_row(columns: list[Column], task: Task, rows: list[Row | None]) -> str:
    known = [row for row in rows if row is not None]
    metric, values = main_name(known), [main_value(row) if row else None for row in rows]
    what = ", ".join(filter(None, [kind_of(task), metric + unit(metric) if metric else ""]))
    name = f"<th scope=row>{breakable(known[0]['dataset'])}<small>{breakable(what)}</small></th>"
    steps = [row["step"] if row else None for row in rows]
    return f"<tr>{name}{_cells(columns, metric, values, steps)}</tr>"


def _cells(columns: list[Column], metric: str, values: list[float | None], steps: list[int | None]) -> str:
    """One cell per column: its number, what it keeps of its teacher's, and its step where that is an older one."""
    cells = []
    for column, value, step, bold in zip(columns, values, steps, _is_best(columns, metric, values), strict=True):
        teacher = teacher_of(column, columns)
        kept = _kept(metric, value, values[columns.index(teacher)]) if teacher else ""
        older = f"at step {step:,}" if step is not None and step != column.step else ""
        small = "".join(f"<small>{part}</small>" for part in (kept, older) if part)
        cells.append(f"<td class={'best' if bold else 'number'}>{written(metric, value)}{small}</td>")
    return "".join(cells)


def _is_best(columns: list[Column], metric: str, values: list[float | None]) -> list[bool]:
    """Of each column, whether its value is the best of the rivals'."""
    rivals = _rivals(columns)
    top = best(metric, [value for column, value in zip(columns, values, strict=True) if column in rivals])
    compared = zip(columns, values, strict=True)
    return [value is not None and value == top and column in rivals for column, value in compared]


def _rivals(columns: list[Column]) -> list[Column]:
    """Who is compared for the best: those that are no teacher, or all where these are fewer than two."""
    learning = [column for column in columns if not column.teaches]
    return learning if len(learning) > 1 else columns


def _some_teach(columns: list[Column]) -> bool:
    return len(_rivals(columns)) < len(columns)


def _kept(metric: str, value: float | None, teacher: float | None) -> str:
    """Like -11.7, 63 %: the difference in points and the share of the teacher's number; empty where one is missing."""
    if value is None or not teacher or not is_share(metric):
        return ""
    return f"{100 * (value - teacher):+.1f}, {value / teacher:.0%}".replace("-", "\N{MINUS SIGN}").replace("%", " %")


# All metrics ---------------------------------------------------------------------------------------------------------


def _all_metrics(columns: list[Column]) -> str:
    body = "".join(_metric_rows(columns, task, rows) for task, rows in tasks_of(columns).items())
    names = "<th scope=col>task</th><th scope=col>images</th><th scope=col>metric</th>"
    head = f"{names}{''.join(map(_head, columns))}"
    return fold("All metrics of all tasks", table(head, body, caption="All metrics of all tasks"))


def _metric_rows(columns: list[Column], task: Task, rows: list[Row | None]) -> str:
    """One group of table rows: a metric each, from the row of results.jsonl in each column."""
    known = [row for row in rows if row is not None]
    lines = []
    for metric in dict.fromkeys(name for row in known for name in row["metrics"] if name != "main_metric"):
        values = [number(row["metrics"].get(metric)) if row else None for row in rows]
        if any(value is not None for value in values):  # acc5 of a four-class task is null
            lines.append(f"<td>{breakable(metric + unit(metric))}</td>{_plain_cells(columns, metric, values)}")
    start = (
        f"<th scope=rowgroup rowspan={len(lines)}>{breakable(known[0]['dataset'])}"
        f"<small>{escape(kind_of(task))}</small></th><td class=number rowspan={len(lines)}>{_images(known)}</td>"
    )
    return f"<tbody><tr>{start}{'</tr><tr>'.join(lines)}</tr></tbody>" if lines else ""


def _plain_cells(columns: list[Column], metric: str, values: list[float | None]) -> str:
    bold = ("best" if is_best else "number" for is_best in _is_best(columns, metric, values))
    return "".join(f"<td class={name}>{written(metric, v)}</td>" for name, v in zip(bold, values, strict=True))


def _images(rows: list[Row]) -> str:
    """How many counted, and how many were unreadable."""
    most = max(rows, key=lambda row: row["n"])
    bad = max(row.get("bad", 0) for row in rows)
    return f"{most['n']:,}" + (f"<small>{bad:,} unreadable</small>" if bad else "")
