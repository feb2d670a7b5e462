"""What the report draws: curves over steps and histograms over 0..1, as inline SVG for the page and as PNG for papers.

panel = Curve("loss", [Line("small_kd", 0, steps, losses)])
inline_svg(panel); write_png(panel, Path("loss.png"))
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kd_accel.schema import ConfigError
from kd_accel.whole_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of the runs, in order, after Okabe and Ito's palette for the colour-blind; of middling lightness, so that they
# are readable on white and on near-black. Further runs repeat them with dashes.
COLORS = ("#2b7bba", "#d55e00", "#009e73", "#b5579a", "#a88300", "#4293b8", "#8f7060", "#7f7f7f")
DASHES = ("solid", "dashed", "dotted")
INK = "#123456"  # replaced by the page's text colour
MAX_POINTS = 600  # of a drawn line: more cannot be seen
MAX_DOTS = 40  # points of a line that are drawn as such
BINS = 40  # of a histogram over 0..1


@dataclass(frozen=True)
class Line:
    """One run in a panel; `number` is its place among the runs, which decides colour and dashes."""

    label: str
    number: int
    x: np.ndarray  # [n]
    y: np.ndarray  # [n], nan leaves a gap; of a histogram: [m] values, and no x

    @property
    def style(self) -> dict[str, str]:
        return {"color": color(self.number), "linestyle": dash(self.number)}


@dataclass(frozen=True)
class Curve:
    """Lines over steps. `name` is the metric's; it keeps apart the ids of a page's pictures."""

    name: str
    lines: list[Line]

    def draw(self, axes: Axes) -> None:
        widths = np.linspace(2.4, 1.4, len(self.lines)) if len(self.lines) > 1 else (1.6,)  # shows what lies below
        for line, width in zip(self.lines, widths, strict=True):
            x, y = thinned(line.x, line.y)
            dots = "o" if len(x) <= MAX_DOTS else None  # a point between two gaps has no line
            axes.plot(x, y, linewidth=width, marker=dots, markersize=3, label=_short(line.label), **line.style)
        axes.set_xlabel("step")

    @property
    def words(self) -> str:
        """The picture for who does not see it."""
        return f"{self.name} over steps. {'; '.join(_ends(line) for line in self.lines)}"


@dataclass(frozen=True)
class Histogram:
    """The share of each line's values in every bin of 0..1."""

    name: str
    lines: list[Line]

    def draw(self, axes: Axes) -> None:
        for line in self.lines:
            counts, edges = np.histogram(line.y, bins=BINS, range=(0.0, 1.0))
            axes.stairs(counts / max(1, len(line.y)), edges, linewidth=1.6, label=_short(line.label), **line.style)
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(bottom=0.0)
        axes.set_ylabel("share of samples")

    @property
    def words(self) -> str:
        """The picture for who does not see it."""
        means = (f"{line.label}: mean {np.mean(line.y):.3g}" for line in self.lines if len(line.y))
        return f"Histogram of {self.name}. {'; '.join(means)}"


Panel = Curve | Histogram


def color(number: int) -> str:
    """Of the run at this place."""
    return COLORS[number % len(COLORS)]


def dash(number: int) -> str:
    """Of the run at this place, in the words of matplotlib and of CSS."""
    return DASHES[number // len(COLORS) % len(DASHES)]


def inline_svg(panel: Panel) -> str:
    """An element of an HTML page, in the page's own text colour."""
    colors = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    svg = io.StringIO()
    with _figure(panel, colors | {"svg.fonttype": "none", "svg.hashsalt": panel.name}) as figure:
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _element(svg.getvalue())


def write_png(panel: Panel, path: Path) -> None:
    """The same picture on white, 200 dots per inch, beside it a legend where there are several lines."""
    several = len(panel.lines) > 1
    with _figure(panel, {}, width=5.8 if several else 4.4) as figure:
        figure.axes[0].set_title(_short(panel.name), fontsize=9)
        if several:
            figure.legend(loc="outside right upper", frameon=False, fontsize=7)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=200, metadata={"Software": None})


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of every stretch of a long line, and its ends: peaks stay."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), MAX_POINTS // 2):
        known = part[np.isfinite(y[part])]
        kept |= {known[y[known].argmin()], known[y[known].argmax()]} if len(known) else {part[0]}
    kept = np.array(sorted(kept))
    return x[kept], y[kept]


@contextmanager
def _figure(panel: Panel, style: dict, *, width: float = 4.4) -> Iterator:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("report needs matplotlib: pip install 'kd_accel[report]'") from None
    # names of runs and metrics are text, not formulas between dollar signs
    with rc_context(style | {"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(width, 2.6), layout="constrained")
        axes = figure.add_subplot(frameon=False)
        panel.draw(axes)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(length=0)
        yield figure


def _short(name: str) -> str:
    """The start and the end of a name that would fill the picture."""
    return name if len(name) <= 32 else f"{name[:15]}...{name[-14:]}"


def _ends(line: Line) -> str:
    known = line.y[np.isfinite(line.y)]
    return f"{line.label}: from {known[0]:.4g} to {known[-1]:.4g}" if len(known) else f"{line.label}: no finite value"


def _element(svg: str) -> str:
    """An SVG file's text without prolog, metadata, fixed size and repeated ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    return re.sub(r'<g id="[^"]*"', "<g", svg).replace(INK, "currentColor").strip()
