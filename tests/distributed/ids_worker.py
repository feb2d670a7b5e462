"""kd-accel that notes the samples of every step, a file per rank: IDS=FOLDER ids_worker.py train ..."""

import json
import os
from pathlib import Path

from kd_accel import cli, distributed
from kd_accel.objective import Objective

forward = Objective.forward


def noting_forward(self, student, teachers, progress, *, ids, labels):
    with Path(os.environ["IDS"], f"rank{distributed.rank()}.jsonl").open("a") as file:
        file.write(json.dumps({"step": progress.step + 1, "ids": ids.tolist()}) + "\n")
    return forward(self, student, teachers, progress, ids=ids, labels=labels)


def noted(folder: Path) -> dict[int, list[int]]:
    """The sample ids of each step's global batch, in order: those of all ranks behind one another."""
    batches: dict[int, list[int]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            batches[row["step"]] = batches.get(row["step"], []) + row["ids"]
    return batches


if __name__ == "__main__":
    Objective.forward = noting_forward
    cli.run()
