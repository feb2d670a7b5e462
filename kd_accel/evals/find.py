"""Which folders hold an evaluation set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from kd_accel.evals.sets import EvalSet
from kd_accel.evals.tars import MARKERS, open_tars
from kd_accel.schema import ConfigError


def find_sets(folders: str | Path | list[str | Path]) -> list[EvalSet]:
    """The sets that `folders` name, in order; a folder of sets gives all of them, sorted by name.

    Raises ConfigError, saying what was looked for, where a folder is none of the layouts.
    """
    folders = folders if isinstance(folders, list) else [folders]
    found = [eval_set for folder in folders for eval_set in _find(Path(folder))]
    names = Counter(eval_set.name for eval_set in found)
    # a/val and b/val must not become one row of a report
    return [s if names[s.name] == 1 else replace(s, name=f"{s.path.parent.name}/{s.name}") for s in found]


def _find(folder: Path) -> list[EvalSet]:
    if not folder.is_dir():
        raise ConfigError(f"data: {folder}: no such folder")
    if here := open_tars(folder):
        return [here]
    below = [open_tars(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not any(below):
        raise ConfigError(
            f"data: {folder} holds no evaluation set: looked for {', '.join(MARKERS)} (CLIP_benchmark's layout), "
            "for *.tar (images with captions), and for either in its subfolders"
        )
    return [eval_set for eval_set in below if eval_set]
