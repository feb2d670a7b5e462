"""What each run is, in two or three sentences: what it was trained from, for how long, and what came of it."""

from __future__ import annotations

from typing import Any

from kd_accel.report.columns import Column, columns_of, mean_of_common, teacher_of
from kd_accel.report.numbers import number, written
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
    """Like: Student of small_teacher, 5.0 M parameters. Loss: clip, 2000 feature_mse, logit_kl."""
    if not run.settings:
        return ""
    found = teachers_among(run, runs)
    sources = [found[name].name if name in found else _source(section) for name, section in run.teachers.items()]
    pupils = [other.name for other in runs if run in teachers_among(other, runs).values()]
    parts = [f"teacher of {_list(pupils)}"] if pupils else []
    parts += [f"student of {_list(sources)}"] if sources else []
    parts = parts or ["trained without a teacher"]
    parts += [f"{run.parameters / 1e6:,.1f} M parameters"] if run.parameters else []
    sentence = ", ".join(parts)
    losses = ", ".join(map(_loss, run.settings.get("objective", {}).get("terms", {}).values()))
    return f"{sentence[0].upper()}{sentence[1:]}." + (f" Loss: {losses}." if losses else "")


def _list(names: list[str]) -> str:
    return " and ".join(names) if len(names) <= 3 else f"{len(names)} others"


def _source(section: dict[str, Any]) -> str:
    """A teacher that is not on the page, as its section of the config names it."""
    arch, tag = section.get("arch"), section.get("pretrained")
    return str(section.get("path") or f"{arch}{f' ({tag})' if tag else ''}")


def _loss(term: dict[str, Any]) -> str:
    """A term's kind behind its weight; of a weight that moves, that it does."""
    weight = number(term.get("weight", 1.0))
    before = "scheduled " if weight is None else "" if weight == 1 else f"{weight:g} "
    return before + term["kind"]


def _effort(run: Run) -> str:
    """Like: 104 steps, 26,624 samples in 1 min 45 s of training: 250 samples/s on 2 processes."""
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
    step = rows[-1]["step"]
    return f"{step:,} step{'s' if step > 1 else ''}, {samples:,} samples in {_duration(seconds)} of training: {speed}."


def _duration(seconds: float) -> str:
    """In its two largest units."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(minutes)} min {int(seconds % 60)} s" if hours < 1 else f"{int(hours):,} h {int(minutes % 60)} min"


def _trouble(run: Run) -> str:
    """Skipped steps, unreadable samples, and losses that were not finite; empty for a healthy run."""
    counts = {"skipped steps": "skipped", "unreadable samples, replaced": "bad_samples"}
    last = run.metrics[-1] if run.metrics else {}
    found = [f"{what}: {last[key]:,}" for what, key in counts.items() if number(last.get(key))]
    broken = sum("loss" in row and row["loss"] is None for row in run.metrics)
    found += [f"logged steps whose loss is not finite: {broken:,} of {len(run.metrics):,}"] if broken else []
    return f"Note: {'; '.join(found)}." if found else ""


def _score(column: Column, columns: list[Column], means: list[float], num_tasks: int) -> str:
    """Like: 11.9 % mean of 10 tasks, 86 % of its teacher's; as HTML."""
    mean, teacher = means[columns.index(column)], teacher_of(column, columns)
    above = means[columns.index(teacher)] if teacher else 0
    kept = f", {mean / above:.0%} of its teacher's".replace("%", " %") if above > 0 else ""
    model = "" if column.label == column.run.name else f" ({escape(column.label)})"
    what = f"mean of {num_tasks} tasks" if num_tasks > 1 else "in one task"
    return f"<p class=score><b>{written('mean', mean)} %</b> {what}{kept}{model}</p>"
