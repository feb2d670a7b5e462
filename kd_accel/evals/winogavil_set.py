"""WinoGAViL (arXiv 2207.12576): which of 5 to 12 pictures does a cue associate with? Read in two layouts.

FOLDER/questions.jsonl           {"cue": "pogonophile", "candidates": [KEY, ...], "associations": [KEY, ...]} per line
FOLDER/test/{nshards.txt,0.tar}  each picture once: KEY.jpg, and KEY.txt with its name; written by `eval prepare`

FOLDER/winogavil_dataset.csv     the authors' own: columns cue, candidates and associations, the latter as lists in JSON
FOLDER/winogavil_images/*.jpg    a picture per name of a candidate
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_accel.data.members import IMAGE_EXTENSIONS
from kd_accel.data.scan import scan
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.evals.tars import numbered_tars
from kd_accel.evals.winogavil import Association
from kd_accel.schema import ConfigError

QUESTIONS = "questions.jsonl"
CSV, CSV_IMAGES = "winogavil_dataset.csv", "winogavil_images"


@dataclass(frozen=True)
class WinogavilSet(EvalSet):
    """Pictures, each once, and questions about them."""

    def samples(self) -> list[Sample]:
        """The pictures. Raises ConfigError for a damaged tar and for a set without any."""
        samples = _tar_images(self.path) if (self.path / QUESTIONS).is_file() else _named_images(self.path)
        if not samples:
            raise ConfigError(f"{self.path}: no pictures")
        return samples

    def questions(self) -> list[Association]:
        """The questions, whose candidates and associations are rows of samples().

        Raises ConfigError, naming file and line, for a question that is none or names an absent picture.
        """
        row_of = {sample.key: row for row, sample in enumerate(self.samples())}
        from_tars = (self.path / QUESTIONS).is_file()
        path = self.path / (QUESTIONS if from_tars else CSV)
        questions = []
        for line, values in _read(path, _jsonl if from_tars else _csv):
            try:
                questions.append(_question(values, row_of))
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
        if not questions:
            raise ConfigError(f"{path}: no questions")
        return questions


def open_winogavil(folder: Path, *, name: str | None = None, split: str = "test") -> WinogavilSet | None:
    """The set in `folder`, or None where it bears no sign of one; it has no training split."""
    if split == "test" and any((folder / sign).is_file() for sign in (QUESTIONS, CSV)):
        return WinogavilSet(name or folder.resolve().name, folder, "winogavil")
    return None


def _tar_images(folder: Path) -> list[Sample]:
    samples = []
    for tar in numbered_tars(folder / "test"):
        for key, members in scan(tar):
            places = [members[extension] for extension in IMAGE_EXTENSIONS if extension in members]
            samples += [Sample(key, tar, *place) for place in places[:1]]
    return samples


def _named_images(folder: Path) -> list[Sample]:
    """The pictures that the questions name, in the order of their names."""
    names = set()
    for line, values in _read(folder / CSV, _csv):
        try:
            names.update(values["candidates"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{folder / CSV}, line {line}: {type(error).__name__}: {error}") from None
    return [Sample(name, folder / CSV_IMAGES / f"{name}.jpg") for name in sorted(names)]


def _question(values: dict[str, Any], row_of: dict[str, int]) -> Association:
    cue, candidates, associations = values["cue"], values["candidates"], values["associations"]
    if not isinstance(cue, str) or not cue.strip():
        raise ValueError("a question needs a cue")
    if not associations or not set(associations) <= set(candidates):
        raise ValueError(f"the associations {associations} are not among the candidates {candidates}")
    if absent := [key for key in candidates if key not in row_of]:
        raise ValueError(f"the set has no picture '{absent[0]}'")
    return Association(cue.strip(), tuple(map(row_of.get, candidates)), tuple(map(row_of.get, associations)))


def _read(path: Path, parse) -> Iterable[tuple[int, dict[str, Any]]]:
    """(line number, its values); raises ConfigError for a file that cannot be parsed."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(parse(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _jsonl(file: Iterable[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    return ((number, json.loads(line)) for number, line in enumerate(file, start=1) if line.strip())


def _csv(file: Iterable[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(file)
    lists = ("candidates", "associations")
    return ((rows.line_num, row | {name: json.loads(row[name]) for name in lists if row.get(name)}) for row in rows)
