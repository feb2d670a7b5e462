"""kd-accel eval RUN_OR_RELEASE data=FOLDER: every evaluation set of the folder, on all processes.

    kd-accel eval runs/demo data=datasets/zeroshot
    torchrun --nproc_per_node 8 -m kd_accel eval runs/demo data=[datasets/zeroshot,datasets/val] batch_size=512

Each set appends one row to results.jsonl as soon as it is done; a table of all of them ends the output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_accel import distributed
from kd_accel.eval_config import EvalConfig, MeasureConfig
from kd_accel.evals.encoder import Encoder, load_encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import measure
from kd_accel.evals.sets import EvalSet
from kd_accel.schema import ConfigError

TIMEOUT_S = 3600  # a rank may decode its images this much longer than another


def run(config: EvalConfig) -> None:
    """Evaluate `config.model` on every set in `config.data`; raises ConfigError for what cannot be evaluated."""
    distributed.start_process_group(TIMEOUT_S)
    eval_sets = find_sets(config.data)
    encoder = load_encoder(
        config.model,
        image_from=config.image_from,
        text_from=config.text_from,
        ensemble=config.ensemble,
        precision=config.precision,
    )
    output = Path(config.output) if config.output else encoder.home / "results.jsonl"
    if problem := distributed.from_main(_why_not_writable(output) if distributed.is_main() else None):
        raise ConfigError(problem)
    rows = []
    for row in evaluate(encoder, eval_sets, config):
        rows.append(row)
        if distributed.is_main():
            _append(output, row)
            print(_in_words(row), flush=True)
    if distributed.is_main():
        print(f"\n{encoder.title}\n{table(rows)}\nwritten to {output}")


def evaluate(encoder: Encoder | Ensemble, eval_sets: list[EvalSet], config: MeasureConfig) -> Iterator[dict[str, Any]]:
    """One row of results.jsonl per set, as soon as it is done; the same rows on every rank."""
    for eval_set in eval_sets:
        yield measure(encoder, eval_set, config)


def _why_not_writable(output: Path) -> str | None:
    """Asked before the first set, not after an hour."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        return f"output: {output} cannot be written ({error.strerror}): name another file with output=FILE"


def _append(output: Path, row: dict[str, Any]) -> None:
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _in_words(row: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {_percent(value)} %" for name, value in row["metrics"].items() if value is not None)
    return f"{row['dataset']}: {metrics}; {row['n']} images" + (f", {row['bad']} unreadable" if row["bad"] else "")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in aligned columns, metrics in percent; the sets of each task under one head."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return "\n\n".join(_task_table([row for row in rows if row["task"] == task]) for task in tasks)


def _task_table(rows: list[dict[str, Any]]) -> str:
    metrics = list(rows[0]["metrics"])
    heads = [f"{metric} %".replace("_retrieval_recall@", " R@") for metric in metrics]  # six long names fill no screen
    lines = [[rows[0]["task"], "images", "unreadable", *heads]]
    for row in rows:
        values = [_percent(row["metrics"][metric]) for metric in metrics]
        lines.append([row["dataset"], str(row["n"]), str(row["bad"]), *values])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_aligned(line, widths) for line in lines)


def _aligned(cells: list[str], widths: list[int]) -> str:
    """The first cell to the left, the numbers to the right."""
    first, *numbers = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join([first.strip().ljust(widths[0]), *numbers])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
