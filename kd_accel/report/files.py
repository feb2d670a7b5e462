"""What lies beside the page: metrics.csv with every number of the runs, and the panels as PNG.

pandas.read_csv("metrics.csv").query("task == 'train'").pivot_table("value", "step", ["metric", "run"]).plot()
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_accel.report.numbers import number
from kd_accel.report.pictures import Panel, write_png
from kd_accel.report.runs import Run
from kd_accel.text_files import replace_text

COLUMNS = ("run", "model", "step", "task", "key", "metric", "value")


def write_csv(runs: list[Run], path: Path) -> None:
    """One line per number, of training (task "train") and of evaluation; no value where it was not finite.

    key is the evaluation task's ("vtab/cifar100"); step is empty for a release.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        writer.writerows(_training(run))
        writer.writerows(_evaluation(run))
    replace_text(path, text.getvalue())


def _training(run: Run) -> Iterator[tuple[Any, ...]]:
    for row in run.metrics:
        numbers = {key: number(value) for key, value in row.items() if key != "step"}
        yield from ((run.name, "", row["step"], "train", "", key, value) for key, value in numbers.items())


def _evaluation(run: Run) -> Iterator[tuple[Any, ...]]:
    for row in run.results:
        place = (run.name, row["model"], row["step"], row["task"], row["key"])
        yield from ((*place, metric, number(value)) for metric, value in row["metrics"].items())


def write_figures(panels: list[Panel], folder: Path) -> None:
    """Every panel as PNG, named after its metric."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for panel in panels:
        name = re.sub(r"[^\w.@-]+", "_", panel.name).strip("._")[:80] or "panel"
        name = next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(panels) + 2))) if n.lower() not in taken)
        taken.add(name.lower())
        write_png(panel, folder / f"{name}.png")
