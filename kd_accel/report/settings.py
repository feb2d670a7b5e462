"""What the runs were told and where they ran: their configs' differences, their configs, their environments."""

from __future__ import annotations

import json
from typing import Any

from kd_accel.config import TrainConfig
from kd_accel.report.page import Section, breakable, escape, fold, missing, note, swatch, table
from kd_accel.report.runs import Run
from kd_accel.schema import ConfigError, flat, validate


def config_section(runs: list[Run]) -> Section:
    """Of several runs the settings that differ, of one those that are not the default; below them the whole files."""
    known = [run for run in runs if run.config is not None]
    absent = missing([run for run in runs if run.config is None], "config.yaml", "kd-accel train CONFIG.yaml")
    texts = (fold(f"config of {run.name}", f"<pre tabindex=0>{escape(run.config)}</pre>") for run in known)
    changes = _differences(known) if len(known) > 1 else "".join(map(_changed, known))
    return Section("Config", absent + changes + "".join(texts))


def _differences(runs: list[Run]) -> str:
    settings = [flat(run.settings) for run in runs]
    keys = [key for key in _keys(settings) if len({_text(values, key) for values in settings}) > 1]
    if not keys:
        return note("The configs are equal.")
    title = "Settings that differ"
    return note(f"{title}:") + _settings_table(title, runs, settings, keys)


def _changed(run: Run) -> str:
    """The settings of a run that are not the schema's default."""
    try:
        values = validate(TrainConfig, run.settings).model_dump(mode="json", exclude_defaults=True)
    except ConfigError:
        return note("Written for another version of kd_accel: what is not its default cannot be told.")
    title = "Settings that are not the default"
    return note(f"{title}:") + _settings_table(title, [run], [flat(values)], list(flat(values)))


def environment_section(runs: list[Run]) -> Section:
    """A value that all runs share stands once."""
    known = [run for run in runs if run.environment is not None]
    absent = missing([r for r in runs if r.environment is None], "environment.json", "kd-accel train CONFIG.yaml")
    settings = [flat(run.environment) for run in known]
    content = _settings_table("Environment", known, settings, _keys(settings)) if known else ""
    return Section("Environment", absent + content)


def _settings_table(title: str, runs: list[Run], settings: list[dict[str, Any]], keys: list[str]) -> str:
    """A row per key, a column per run."""
    head = "".join(f"<th scope=col>{swatch(run.number)}{breakable(run.name)}</th>" for run in runs)
    rows = "".join(f"<tr><th scope=row>{breakable(key)}</th>{_cells(settings, key)}</tr>" for key in keys)
    return table(f"<th scope=col>key</th>{head}", f"<tbody>{rows}</tbody>", caption=title)


def _cells(settings: list[dict[str, Any]], key: str) -> str:
    texts = [_text(values, key) for values in settings]
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"<td colspan={len(texts)}>{breakable(texts[0])}</td>"
    return "".join(f"<td>{breakable(text)}</td>" for text in texts)


def _keys(settings: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for values in settings for key in values))


def _text(values: dict[str, Any], key: str) -> str:
    """As YAML writes it, with a dash where a key is absent."""
    if key not in values:
        return "\N{EN DASH}"
    value = values[key]
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
