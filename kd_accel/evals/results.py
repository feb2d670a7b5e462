"""results.jsonl, a row per finished task of a model at a step, and the tables that are made from it.

    FOLDER/results.jsonl                                 grows by whole lines; several evaluations may add to it at once
           evaluation_metrics_all.csv                    a line per model and step, a column per KEY/METRIC
           eval_results/step_1000_eval_results.jsonl     DataComp's own format, for tools that read it

The tables hold nothing of their own: they are made anew from the rows, and a restart loses none.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_accel.evals.encoder import Encoder
from kd_accel.evals.plan import OF_IMAGES
from kd_accel.text_files import read_rows, replace_text

RESULTS, TABLE, DATACOMP = "results.jsonl", "evaluation_metrics_all.csv", "eval_results"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what file systems without locks answer, Lustre for one

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Add a row to the file: on the disk and whole, or not at all. Raises OSError.

    What a killed process left of a line goes away first. A metric that is not finite becomes null, as JSON wants it.
    """
    values = {name: value if value is None or math.isfinite(value) else None for name, value in row["metrics"].items()}
    data = (json.dumps(row | {"metrics": values}) + "\n").encode()
    with locked(path) as file:
        end = _end_of_whole_lines(file)
        os.ftruncate(file, end)
        try:
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file)
        except OSError:
            os.ftruncate(file, end)
            raise


def read_results(path: Path) -> list[Row]:
    """The rows that count, in the order of the file: the newest of each model, step, key and task; [] without a file.

    Rows that do not say of which weights they are, as earlier versions wrote them, do not count. Raises ConfigError
    for a line that is not a JSON object; the last one may be cut off, and is left out then.
    """
    rows = [row for row in read_rows(path) if "weights" in row] if path.exists() else []
    newest = {(row["model"], row["step"], row["key"], row["task"]): number for number, row in enumerate(rows)}
    return [rows[number] for number in sorted(newest.values())]


def finished(rows: list[Row], *, model: str, step: int | None, weights: str) -> dict[tuple[str, str], Row]:
    """Of `read_results`, what needs no second evaluation: (key, task) -> row.

    `weights` must be those of the row: a step that was trained again, otherwise, is another model.
    """
    wanted = (model, step, weights)
    return {(row["key"], row["task"]): row for row in rows if (row["model"], row["step"], row["weights"]) == wanted}


def weights_of(encoder: Encoder) -> str:
    """What a row has under "weights": another one for every model, preprocessing, tokenizer and precision."""
    return f"{encoder.image_id[:16]}-{encoder.text_id[:16]}"


def columns(row: Row) -> dict[str, float]:
    """The metrics of a row that have a value, as KEY/METRIC; of a linear probe as KEY/linear_probe/METRIC, and so of a
    class head."""
    place = f"{row['key']}/{row['task']}" if row["task"] in OF_IMAGES else row["key"]
    return {f"{place}/{name}": value for name, value in row["metrics"].items() if value is not None}


def write_tables(path: Path) -> None:
    """Make the tables beside the results file `path` anew; each is the old one or the new one at any moment.

    To be called inside `locked`: two evaluations would write the same temporary files.
    """
    rows = read_results(path)
    replace_text(path.parent / TABLE, _table(rows))
    for target, text in _datacomp_files(rows, path.parent).items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            replace_text(target, text)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file `path`, made where there is none, while no other process is in here: a descriptor that appends.

    Not to be entered twice: the second lock would wait for the first.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        _lock(file)
        yield file
    finally:
        os.close(file)  # and the lock is gone


def _lock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:  # without them, that a row is one write has to be enough
            raise


def _end_of_whole_lines(file: int) -> int:
    """Bytes up to the end of the last line that has one."""
    size = os.fstat(file).st_size
    if not size or os.pread(file, 1, size - 1) == b"\n":
        return size
    return os.pread(file, size, 0).rfind(b"\n") + 1


def _table(rows: list[Row]) -> str:
    """CSV: model, step, and the metrics in the order of their names; no value, no text."""
    lines: dict[tuple[str, int | None], dict[str, float]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["step"]), {}).update(columns(row))
    names = sorted({name for line in lines.values() for name in line})
    file = io.StringIO()
    writer = csv.DictWriter(file, ["model", "step", *names], lineterminator="\n")
    writer.writeheader()
    for model, step in sorted(lines, key=lambda line: (line[0], -1 if line[1] is None else line[1])):
        writer.writerow({"model": model, "step": step} | lines[model, step])
    return file.getvalue()


def _datacomp_files(rows: list[Row], folder: Path) -> dict[Path, str]:
    """One file per model and step; models other than the one that `folder` belongs to have folders of their own."""
    files: dict[Path, str] = {}
    for row in rows:
        if row["task"] in OF_IMAGES:  # DataComp has none, and one row per key
            continue
        own = row["model"] == folder.resolve().name
        place = folder / DATACOMP / ("" if own else row["model"].replace("/", "-"))
        name = "eval_results.jsonl" if row["step"] is None else f"step_{row['step']}_eval_results.jsonl"
        line = json.dumps({key: row[key] for key in ("key", "dataset", "metrics")})
        files[place / name] = files.get(place / name, "") + line + "\n"
    return files
