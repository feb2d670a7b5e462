"""kd-accel report RUN [RUN ...]: curves, evaluation, config and environment of runs side by side, in one HTML file.

The file needs no network, no script and no file beside it. Every text in it comes from the runs and is escaped.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kd_accel.config import ReportConfig
from kd_accel.metrics import flat, replace_text
from kd_accel.pictures import curve, histogram
from kd_accel.runs import MEMORY, Run, read_runs

CURVES = {
    "Loss": lambda key: key == "loss" or key.startswith("loss/"),
    "Learning rate and temperature": lambda key: key == "lr" or "temperature" in key,
    "Gradient norm": lambda key: key == "grad_norm",
    "Throughput": lambda key: key in ("samples_per_second", "data_wait"),
}

STYLE = """
:root { color-scheme: light dark; --text: #1d2127; --quiet: #5c6470; --line: #d9dde3; --page: #fff; --panel: #f6f7f9 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --quiet: #9aa3af; --line: #363c45; --page: #15181c; --panel: #1d2126 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line) }
p.note { color: var(--quiet); margin: .4rem 0 }
ul.runs { list-style: none; padding: .5rem 0; margin: 0; position: sticky; top: 0; background: var(--page);
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem }
ul.runs i { display: inline-block; width: 1.4em; height: .3em; border-radius: 2px; margin-right: .45em;
  vertical-align: middle }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1rem }
figure { margin: 0; padding: .5rem; background: var(--panel); border-radius: 6px; min-width: 0 }
figcaption { font-size: .85rem; color: var(--quiet) }
svg { display: block; width: 100%; height: auto; max-width: 460px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 600; white-space: nowrap }
td.number { text-align: right; white-space: nowrap }
thead th small { display: block; font-weight: 400; color: var(--quiet) }
td.best { font-weight: 700 }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .75rem; background: var(--panel); border-radius: 6px }
summary { cursor: pointer; padding: .25rem 0 }
"""


def run(config: ReportConfig) -> Path:
    """The verb: write the report of `config.runs` and say where it is."""
    runs = [Path(name) for name in config.runs]
    path = write_report(runs, Path(config.output) if config.output else runs[0] / "report.html")
    print(f"report: {path}")
    return path


def write_report(runs: list[Path], output: Path) -> Path:
    """Write one self-contained HTML page about `runs` to `output`, atomically; returns `output`.

    Raises ConfigError for a run directory that does not exist, and without matplotlib.
    """
    shown = read_runs(runs)
    sections = [
        _section("Evaluation", _evaluation(shown)),
        *(_section(title, _curves(shown, belongs)) for title, belongs in _groups(shown).items()),
        *_confidences(shown),
        _section("Config", _config_difference(shown) + _configs(shown)),
        _section("Environment", _environment(shown)),
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_text(output, _page(shown, "\n".join(sections)))
    return output


# Curves -------------------------------------------------------------------------------------------------------------


def _groups(runs: list[Run]) -> dict[str, Any]:
    """CURVES, and a last section for whatever else the runs logged."""
    counts = {"step", "epoch", "samples"}
    rest = {key for key in _keys(runs) if key not in counts and not any(belongs(key) for belongs in CURVES.values())}
    return CURVES | ({"Other metrics": rest.__contains__} if rest else {})


def _keys(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for row in run.metrics for key in row))


def _curves(runs: list[Run], belongs) -> str:
    keys = sorted(key for key in _keys(runs) if belongs(key))
    missing = _missing([run for run in runs if not run.metrics], "metrics.jsonl", "kd-accel train CONFIG.yaml")
    if not keys:
        return missing or "<p class=note>Not logged by these runs.</p>"
    figures = (f"<figure>{_curve(runs, key)}<figcaption>{html.escape(key)}</figcaption></figure>" for key in keys)
    return f"{missing}<div class=curves>{''.join(figures)}</div>"


def _curve(runs: list[Run], key: str) -> str:
    """One panel: `key` over steps, a line per run."""
    points = ([(row["step"], row[key]) for row in run.metrics if row.get(key) is not None] for run in runs)
    return curve([(run.color, line) for run, line in zip(runs, points, strict=True)], name=key)


# Confidences ---------------------------------------------------------------------------------------------------------


def _confidences(runs: list[Run]) -> list[str]:
    """A section with a histogram per teacher; none when no run remembers confidences."""
    teachers = sorted({teacher for run in runs for teacher in run.confidences or {}})
    unreadable = ", ".join(html.escape(run.name) for run in runs if run.confidences is None)
    content = (
        f"<p class=note>No readable <code>{MEMORY}</code> in the newest checkpoint of {unreadable}: "
        "<code>kd-accel train CONFIG.yaml</code> writes it.</p>"
        if unreadable
        else ""
    )
    if teachers:
        content += f"<div class=curves>{''.join(_confidence(runs, teacher) for teacher in teachers)}</div>"
    return [_section("Confidence of the teacher", content)] if content else []


def _confidence(runs: list[Run], teacher: str) -> str:
    """How many samples the teacher is how sure of: its probability of the right partner when each was last seen."""
    known = [(run, run.confidences[teacher]) for run in runs if teacher in (run.confidences or {})]
    seen = [(run.color, alpha[~np.isnan(alpha)]) for run, alpha in known]
    counts = (
        f"{html.escape(run.name)}: {_seen(values, len(alpha))}"
        for (run, alpha), (_, values) in zip(known, seen, strict=True)
    )
    caption = "<br>".join([html.escape(teacher), *counts])
    return f"<figure>{histogram(seen, name=f'confidence {teacher}')}<figcaption>{caption}</figcaption></figure>"


def _seen(values: np.ndarray, total: int) -> str:
    mean = f", mean {values.mean(dtype=np.float64):.3g}" if len(values) else ""
    return f"{len(values):,} of {total:,} samples seen{mean}"


# Tables -------------------------------------------------------------------------------------------------------------


def _evaluation(runs: list[Run]) -> str:
    """Rows = task x metric, columns = run and step; the newest row of a (task, step) counts, the best value is bold."""
    missing = _missing([r for r in runs if not r.results], "results.jsonl", "kd-accel eval RUN data=FOLDER")
    newest: dict[tuple[int, int], dict[tuple[str, str], dict]] = {}  # (run number, step) -> {(dataset, task): row}
    for number, run in enumerate(runs):
        for row in run.results:
            step = -1 if row["step"] is None else row["step"]  # a release has no step
            newest.setdefault((number, step), {})[row["dataset"], row["task"]] = row
    columns = sorted(newest)
    if not columns:
        return missing
    head = "".join(_column_head(runs[number].name, step) for number, step in columns)
    tasks = dict.fromkeys(task for column in columns for task in newest[column])
    body = "".join(_task_rows(task, [newest[column].get(task) for column in columns]) for task in tasks)
    return missing + _table(f"<th>data</th><th>images</th><th>metric</th>{head}", body)


def _column_head(name: str, step: int) -> str:
    return f"<th>{html.escape(name)}<small>{'release' if step < 0 else f'step {step:,}'}</small></th>"


def _task_rows(task: tuple[str, str], results: list[dict | None]) -> str:
    """One table row per metric of a (dataset, task), from the row of results.jsonl in each column."""
    known = [row for row in results if row is not None]
    place = "<br>".join(html.escape(name) for name in task)
    start = f"<td>{place}</td><td class=number>{max(row['n'] for row in known):,}</td>"
    rows = []
    for metric in dict.fromkeys(name for row in known for name in row["metrics"]):
        values = [row["metrics"].get(metric) if row else None for row in results]
        if any(value is not None for value in values):  # acc5 of a four-class task is null
            rows.append(f"<tr>{start}<td>{html.escape(metric)}</td>{_cells(values)}</tr>")
    return "".join(rows)


def _cells(values: list[float | None]) -> str:
    """One cell per column, the best of several in bold; every metric of results.jsonl is better when higher."""
    known = [value for value in values if value is not None]
    best = max(known) if len(known) > 1 else None
    return "".join(
        f'<td class="number{" best" if value is not None and value == best else ""}">{_percent(value)}</td>'
        for value in values
    )


def _percent(value: float | None) -> str:
    return "&ndash;" if value is None else f"{100 * value:.1f}%"


def _config_difference(runs: list[Run]) -> str:
    known = [run for run in runs if run.config is not None]
    if len(known) < 2:
        return ""
    settings = [flat(yaml.safe_load(run.config)) for run in known]
    rows = _differing_rows(settings, only_differing=True)
    if not rows:
        return "<p class=note>The configs are equal.</p>"
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in known)
    return f"<p class=note>Settings that differ:</p>{_table(f'<th>key</th>{head}', rows)}"


def _configs(runs: list[Run]) -> str:
    missing = _missing([run for run in runs if run.config is None], "config.yaml", "kd-accel train CONFIG.yaml")
    texts = (
        f"<details><summary>config of {html.escape(run.name)}</summary><pre>{html.escape(run.config)}</pre></details>"
        for run in runs
        if run.config is not None
    )
    return missing + "".join(texts)


def _environment(runs: list[Run]) -> str:
    known = [run for run in runs if run.environment is not None]
    missing = _missing([r for r in runs if r.environment is None], "environment.json", "kd-accel train CONFIG.yaml")
    if not known:
        return missing
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in known)
    rows = _differing_rows([flat(run.environment) for run in known], only_differing=False)
    return missing + _table(f"<th></th>{head}", rows)


def _differing_rows(settings: list[dict[str, Any]], *, only_differing: bool) -> str:
    """One table row per key: its value in each of `settings`, with a dash where a key is absent."""
    rows = []
    for key in dict.fromkeys(key for values in settings for key in values):
        cells = [html.escape(str(values[key])) if key in values else "&ndash;" for values in settings]
        if len(set(cells)) > 1 or not only_differing:
            rows.append(f"<tr><th>{html.escape(key)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "".join(rows)


def _table(head: str, body: str) -> str:
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# Page ---------------------------------------------------------------------------------------------------------------


def _missing(runs: list[Run], file: str, command: str) -> str:
    """What is missing and which command makes it; empty when no run lacks it."""
    if not runs:
        return ""
    names = ", ".join(html.escape(run.name) for run in runs)
    return f"<p class=note>No <code>{file}</code> in {names}: <code>{html.escape(command)}</code> writes it.</p>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _page(runs: list[Run], content: str) -> str:
    title = html.escape(", ".join(run.name for run in runs))
    legend = "".join(f'<li><i style="background:{run.color}"></i>{html.escape(run.name)}</li>' for run in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{title}</h1><ul class=runs>{legend}</ul>\n{content}\n</body></html>\n"
    )
