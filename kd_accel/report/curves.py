"""Everything that training logged, over its steps: one section per kind of metric, one panel per metric."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kd_accel.report.numbers import number
from kd_accel.report.page import Section, escape, figures, missing, note
from kd_accel.report.pictures import Curve, Line
from kd_accel.report.runs import Run

SECTIONS: dict[str, Callable[[str], bool]] = {
    "Loss": lambda key: key == "loss" or key.startswith("loss/"),
    "Learning rate, temperature, gradient": lambda key: key in ("lr", "grad_norm") or "temperature" in key,
    "Throughput": lambda key: key in ("samples_per_second", "data_wait") or key.startswith("seconds/"),
}
COUNTS = ("step", "epoch", "samples")  # what the others are drawn over
MEANINGS = {
    "loss": "weighted sum of all terms",
    "lr": "learning rate",
    "temperature": "of the student's logits",
    "grad_norm": "before clipping",
    "samples_per_second": "of all processes",
    "data_wait": "share of the time, 0 to 1, spent waiting for data",
    "seconds/data": "of one step: waiting for the loader",
    "seconds/transfer": "of one step: to the device",
    "seconds/student": "of one step: the student's forward passes",
    "seconds/teacher": "of one step: the teachers' forward passes",
    "seconds/objective": "of one step: losses and their gradients",
    "seconds/gather": "of one step: features and their gradients between processes",
    "seconds/backward": "of one step: the student's backward pass, with the exchange of gradients",
    "seconds/optimizer": "of one step: clipping, update, moving average",
    "seconds/other": "of one step: everything else",
    "confidence": "the teachers' mean confidence in the samples of a step",
    "skipped": "steps whose loss or gradient was not finite, so far",
    "bad_samples": "unreadable samples, so far",
}


def curve_sections(runs: list[Run]) -> list[Section]:
    """SECTIONS, and a last one for whatever else the runs logged; results of evaluation have their own section."""
    keys = sorted({key for run in runs for row in run.metrics for key in row if not key.startswith("eval/")})
    rest = [key for key in keys if key not in COUNTS and not any(belongs(key) for belongs in SECTIONS.values())]
    sections = [_section(title, [key for key in keys if belongs(key)], runs) for title, belongs in SECTIONS.items()]
    return [*sections, _section("Other metrics", rest, runs)] if rest else sections


def _section(title: str, keys: list[str], runs: list[Run]) -> Section:
    absent = missing([run for run in runs if not run.metrics], "metrics.jsonl", "kd-accel train CONFIG.yaml")
    panels = [curve(key, runs) for key in keys]
    captions = {key: f"<code>{escape(key)}</code> {MEANINGS.get(key, '')}" for key in keys}
    return Section(title, absent + (figures(panels, captions) or note("Not logged by these runs.")), panels)


def curve(key: str, runs: list[Run]) -> Curve:
    """`key` over steps, a line for each run that logged it; a value that is not finite, null in the file, is a gap."""
    return Curve(key, [line for run in runs if len((line := _line(key, run)).x)])


def _line(key: str, run: Run) -> Line:
    rows = [row for row in run.metrics if key in row]
    values = [number(row[key]) for row in rows]
    return Line(run.name, run.number, np.array([row["step"] for row in rows]), np.array(values, dtype=np.float64))
