"""The picture of a card: what a run logged of its losses and its temperature, up to the step that is released."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from kd_accel.export.origin import Origin
from kd_accel.report.numbers import number
from kd_accel.report.pictures import Curve, Line
from kd_accel.text_files import read_rows

COLUMNS = 3
PANEL = 3.2, 2.2  # inches


def write_curves(origin: Origin, file: Path) -> bool:
    """Whether there is a picture: not without matplotlib (the extra "report"), nor of a run that logged nothing."""
    curves = _curves(origin)
    if not curves or find_spec("matplotlib") is None:
        return False
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    across = min(COLUMNS, len(curves))
    down = -(-len(curves) // across)
    with rc_context({"font.size": 9, "text.parse_math": False}):  # names of terms are no formulas
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down), layout="constrained")
        for place, panel in enumerate(curves, start=1):
            axes = figure.add_subplot(down, across, place, frameon=False)
            panel.draw(axes)
            axes.set_title(panel.name, fontsize=9)
            axes.grid(alpha=0.2, linewidth=0.6)
            axes.tick_params(length=0)
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return True


def _curves(origin: Origin) -> list[Curve]:
    """The loss, its terms where there are several, the temperature."""
    log = origin.run / "metrics.jsonl"
    rows = [row for row in read_rows(log) if row["step"] <= origin.step] if log.exists() else []
    logged = dict.fromkeys(key for row in rows for key in row)
    terms = [key for key in logged if key.startswith("loss/")]
    keys = ["loss", *(terms if len(terms) > 1 else []), "temperature"]
    return [_curve(key, rows) for key in keys if key in logged]


def _curve(key: str, rows: list[dict]) -> Curve:
    seen = [row for row in rows if key in row]
    steps, values = ([row["step"] for row in seen], [number(row[key]) for row in seen])
    return Curve(key, [Line(key, 0, np.array(steps), np.array(values, dtype=np.float64))])
