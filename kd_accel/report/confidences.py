"""How sure the teacher is of the samples: what training remembers of it, as a histogram per teacher."""

from __future__ import annotations

import numpy as np

from kd_accel.report.page import Section, escape, figures, note
from kd_accel.report.pictures import Histogram, Line
from kd_accel.report.runs import MEMORY, Run


def confidence_sections(runs: list[Run]) -> list[Section]:
    """One section, or none where no run remembers confidences."""
    teachers = sorted({teacher for run in runs for teacher in run.confidences or {}})
    unreadable = ", ".join(escape(run.name) for run in runs if run.confidences is None)
    if not teachers and not unreadable:
        return []
    panels = {teacher: _histogram(teacher, runs) for teacher in teachers}
    captions = {panel.name: _caption(teacher, runs) for teacher, panel in panels.items()}
    content = figures(panels.values(), captions)
    if unreadable:
        content += note(
            f"No readable <code>{MEMORY}</code> in the newest checkpoint of {unreadable}: "
            "<code>kd-accel train CONFIG.yaml</code> writes it."
        )
    return [Section("Confidence of the teacher", content, list(panels.values()))]


def _known(teacher: str, runs: list[Run]) -> list[tuple[Run, np.ndarray]]:
    return [(run, run.confidences[teacher]) for run in runs if teacher in (run.confidences or {})]


def _histogram(teacher: str, runs: list[Run]) -> Histogram:
    """Its probability of the right partner when each sample was last seen."""
    lines = [Line(run.name, run.number, np.empty(0), alpha[~np.isnan(alpha)]) for run, alpha in _known(teacher, runs)]
    return Histogram(f"confidence {teacher}", lines)


def _caption(teacher: str, runs: list[Run]) -> str:
    counts = (f"{escape(run.name)}: {_seen(alpha)}" for run, alpha in _known(teacher, runs))
    return "<br>".join([escape(teacher), *counts])


def _seen(alpha: np.ndarray) -> str:
    values = alpha[~np.isnan(alpha)]
    mean = f", mean {values.mean(dtype=np.float64):.3g}" if len(values) else ""
    return f"{len(values):,} of {len(alpha):,} samples seen{mean}"
