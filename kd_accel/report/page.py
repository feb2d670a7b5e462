"""The page: sections, tables, figures and folds as HTML, in which every text of the runs is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from kd_accel.report.pictures import Panel, color, dash, inline_svg
from kd_accel.report.runs import Run
from kd_accel.report.style import STYLE

escape = html.escape


@dataclass(frozen=True)
class Section:
    """A heading, what stands below it, and the panels in it, which are also written as PNG."""

    title: str
    content: str  # HTML
    panels: list[Panel] = field(default_factory=list)


def page(title: str, head: str, runs: list[Run], sections: list[Section]) -> str:
    """One HTML document without script, link or anything else that is fetched."""
    body = "\n".join(f"<section><h2>{part.title}</h2>{part.content}</section>" for part in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>{head}</header>\n"
        f"{_legend(runs) if len(runs) > 1 else ''}\n<main>{body}</main>\n</body></html>\n"
    )


def _legend(runs: list[Run]) -> str:
    """It stays in sight, above the curves."""
    lines = "".join(f"<li>{swatch(run.number)}{breakable(run.name)}</li>" for run in runs)
    return f'<ul class=legend aria-label="Colours of the runs">{lines}</ul>'


def breakable(name: str) -> str:
    """The name of a run, a task or a metric, escaped, that a narrow column may break at its joints."""
    return re.sub(r"([_/@:.])", r"\1<wbr>", escape(name))


def swatch(number: int) -> str:
    """A piece of the line by which a run is drawn."""
    return f'<i class=swatch style="border-top:4px {dash(number)} {color(number)}"></i>'


def figures(panels: Iterable[Panel], captions: dict[str, str]) -> str:
    """Panels side by side; `captions` has HTML by panel name, which is its caption where it has none."""
    shown = "".join(
        f'<figure><div role=img aria-label="{escape(panel.words)}">{inline_svg(panel)}</div>'
        f"<figcaption>{captions.get(panel.name, escape(panel.name))}</figcaption></figure>"
        for panel in panels
    )
    return f"<div class=figures>{shown}</div>" if shown else ""


def table(head: str, body: str, *, caption: str) -> str:
    """A table that scrolls inside the page where it is wider, also by keyboard; `head` and `body` are HTML."""
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def fold(summary: str, content: str) -> str:
    """What is seen after a click; `content` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def note(content: str) -> str:
    """A quiet line; `content` is HTML."""
    return f"<p class=note>{content}</p>"


def missing(runs: list[Run], file: str, command: str) -> str:
    """What is missing and which command makes it; empty when no run lacks it."""
    if not runs:
        return ""
    names = ", ".join(escape(run.name) for run in runs)
    return note(f"No <code>{file}</code> in {names}: <code>{escape(command)}</code> writes it.")
