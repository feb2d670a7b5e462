"""What the demo came to: teacher, distilled student and baseline side by side, and a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_accel.demo.runs import results, speed
from kd_accel.models.release_folder import resolve_release
from kd_accel.report.runs import count_parameters


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; several values where several seeds ran."""

    name: str
    parameters: int
    top1: list[float]  # 0..1
    image_to_text: list[float]  # recall@1 of captions for images, 0..1
    text_to_image: list[float]  # recall@1 of images for captions, 0..1
    samples_per_second: list[float]


def row_of(name: str, runs: list[Path]) -> Row:
    """Of the runs of one model, one per seed."""
    scores = [{key: value for row in results(run) for key, value in row["metrics"].items()} for run in runs]
    return Row(
        name=name,
        parameters=count_parameters(resolve_release(str(runs[0]))),
        top1=[score["acc1"] for score in scores],
        image_to_text=[score["text_retrieval_recall@1"] for score in scores],
        text_to_image=[score["image_retrieval_recall@1"] for score in scores],
        samples_per_second=[speed(run) for run in runs],
    )


def table(rows: list[Row]) -> str:
    """The rows as aligned text: percentages, with mean +- standard deviation over seeds."""
    head = ["model", "parameters", "top-1", "image->text R@1", "text->image R@1", "samples/s"]
    lines = [head, *(list(_cells(row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(["", text[0], "-+-".join("-" * width for width in widths), *text[1:]])


def _cells(row: Row) -> Iterator[str]:
    yield row.name
    yield f"{row.parameters:,}"
    for values in (row.top1, row.image_to_text, row.text_to_image):
        spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        yield f"{100 * statistics.mean(values):.1f}{spread} %"
    yield f"{statistics.mean(row.samples_per_second):,.0f}"


def verdict(rows: list[Row]) -> str:
    """One sentence, of teacher, student and baseline."""
    teacher, student, baseline = rows
    gain = 100 * (statistics.mean(student.top1) - statistics.mean(baseline.top1))
    ratio = teacher.parameters / student.parameters
    return f"The student is {ratio:.1f} times smaller than the teacher; distillation adds {gain:+.1f} points of top-1."
