"""What each run is, in two or three sentences: what it was trained from, for how long, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kd_accel.report.columns import Column, columns_of, mean_of_common, teacher_of
from kd_accel.report.numbers import number, unit, written
from kd_accel.report.page import escape, swatch
from kd_accel.report.runs import Run, teachers_among


def summary(runs: list[Run]) -> str:
    """One card per run, as HTML."""
    columns = columns_of(runs)
    common, means = mean_of_common(columns)
    scores = {column: _score(column, columns, means, len(common)) for column in columns} if means else {}
    cards = (_card(run, runs, [score for column, score in scores.items() if column.run is run]) for run in runs)
    return f"<div class=cards>{''.join(cards)}</div>"


def _card(run: Run, runs: list[Run], scores: list[str]) -> str:
    lines = filter(None, [_origin(run, runs), _effort(run), _trouble(run)])
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<article><h2>{swatch(run.number)}{escape(run.name)}</h2>{''.join(scores)}{text}</article>"


def _origin(run: Run, runs: list[Run]) -> str:
    """ "Student of small_teacher, 5.0 M parameters. Losses: clip, 2000 feature_mse, logit_kl."""
    if not run.settings:
        return ""
    among = teachers_among(run, runs)
    sources = [_named(section, among) for section in run.teachers.values()]
    pupils = [other.name for other in runs if run in teachers_among(other, runs)]
    who = f"student of {' and '.join(sources)}" if sources else "trained without a teacher"
    parts = [f"teacher of {' and '.join(pupils)}" if pupils else "", who if sources or not pupils else ""]
    parts.append(f"{run.parameters / 1e6:,.1f} M parameters" if run.parameters else "")
    sentence = ", ".join(filter(None, parts))
    losses = ", ".join(_losses(run.settings.get("objective", {}).get("terms", {})))
    return f"{sentence[0].upper()}{sentence[1:]}. Loss: {losses or 'unknown'}."


def _named(section: dict[str, Any], among: list[Run]) -> str:
    """What a teacher's section of the config names."""
    path, arch, tag = section.get("path"), section.get("arch"), section.get("pretrained")
    known = next((run.name for run in among if path and run.path.resolve().name in str(path)), None)
    return known or str(path or f"{arch}{f' ({tag})' if tag else ''}")


def _losses(terms: dict[str, Any]) -> Iterator[str]:
    for term in terms.values():
        weight = term.get("weight", 1.0)
        yield (
            term["kind"]
            if weight == 1
            else f"{weight:g} {term['kind']}"
            if number(weight)
            else f"scheduled {term['kind']}"
        )


def _effort(run: Run) -> str:
    """ "104 steps, 26,624 samples in 1 min 45 s, 250 samples/s on 2 processes."""
    rows = [row for row in run.metrics if "samples" in row and number(row.get("samples_per_second"))]
    if not rows:
        return ""
    before = [0, *(row["samples"] for row in rows)]
    seconds = sum(
        (row["samples"] - start) / row["samples_per_second"] for row, start in zip(rows, before, strict=False)
    )
    samples, processes = rows[-1]["samples"], (run.environment or {}).get("world_size")
    where = f" on {processes} process{'es' if processes > 1 else ''}" if processes else ""
    precision = f", {run.settings['precision']}" if "precision" in run.settings else ""
    speed = f"{samples / seconds:,.0f} samples/s{where}{precision}"
    return f"{rows[-1]['step']:,} steps, {samples:,} samples in {_duration(seconds)} of training: {speed}."


def _duration(seconds: float) -> str:
    """In its two largest units."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(minutes)} min {int(seconds % 60)} s" if hours < 1 else f"{int(hours):,} h {int(minutes % 60)} min"


def _trouble(run: Run) -> str:
    """Skipped steps and unreadable samples, and a loss that was not finite; empty for a healthy run."""
    counts = {"steps were skipped": "skipped", "unreadable samples were replaced": "bad_samples"}
    last = run.metrics[-1] if run.metrics else {}
    found = [f"{last[key]:,} {what}" for what, key in counts.items() if number(last.get(key))]
    broken = sum("loss" in row and row["loss"] is None for row in run.metrics)
    found += [f"the loss of {broken:,} of {len(run.metrics):,} logged steps is not finite"] if broken else []
    return f"Note: {'; '.join(found)}." if found else ""


def _score(column: Column, columns: list[Column], means: list[float], num_tasks: int) -> str:
    """ "11.9 % mean of 10 tasks, 86 % of its teacher's", as HTML."""
    mean, teacher = means[columns.index(column)], teacher_of(column, columns)
    above = means[columns.index(teacher)] if teacher else 0
    kept = f", {mean / above:.0%} of its teacher's".replace("%", " %") if above > 0 else ""
    model = "" if column.label == column.run.name else f" ({escape(column.label)})"
    what = f"mean of {num_tasks} tasks" if num_tasks > 1 else "in the one task"
    return f"<p class=score><b>{written('mean', mean)}{unit('mean', [mean])}</b> {what}{kept}{model}</p>"
