"""Pictures of the report: inline SVG in the page's own text colour, one colour per run.

svg = curve([("#2b7bba", [(1, 3.0), (2, 1.5)])], name="loss")
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from kd_accel.schema import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of the runs, in order: of middling lightness, so that they are readable on white and on near-black.
COLORS = ("#2b7bba", "#d55e00", "#009e73", "#b5579a", "#b08900", "#4fa3c7", "#8a6d5b", "#7f7f7f")
INK = "#123456"  # replaced by the page's text colour
BINS = 40  # of a histogram over 0..1


def curve(lines: list[tuple[str, list[tuple[int, float]]]], *, name: str) -> str:
    """One panel over steps, a line per run: (colour, points) each. `name` keeps apart the ids of a page's pictures."""
    with _panel(name, "step") as (axes, svg):
        for color, points in lines:
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, color=color, linewidth=1.5, marker="o" if len(points) == 1 else None)
    return _inline(svg.getvalue())


def histogram(samples: list[tuple[str, np.ndarray]], *, name: str) -> str:
    """One panel over 0..1, an outline per run: the share of its values in each bin. (colour, values) each."""
    with _panel(name, "") as (axes, svg):
        for color, values in samples:
            counts, edges = np.histogram(values, bins=BINS, range=(0.0, 1.0))
            axes.stairs(counts / max(1, len(values)), edges, color=color, linewidth=1.5)
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel("share of samples")
    return _inline(svg.getvalue())


@contextmanager
def _panel(name: str, xlabel: str) -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes to draw on, and the SVG file that they have become at the end."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("report needs matplotlib: pip install 'kd_accel[report]'") from None
    colors = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with rc_context(colors | {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}):
        figure, svg = Figure(figsize=(4.4, 2.6), layout="constrained"), io.StringIO()
        axes = figure.add_subplot(frameon=False)
        yield axes, svg
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_xlabel(xlabel)
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _inline(svg: str) -> str:
    """An SVG file's text as an element of an HTML page: no prolog, no metadata, no fixed size, no repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor")
