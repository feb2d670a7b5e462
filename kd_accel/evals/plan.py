"""What there is to do: the sets that are asked for and lie on this machine, and those that do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.find import find_sets, find_task
from kd_accel.evals.sets import EvalSet
from kd_accel.evals.tasks import TASKS, Task, expand
from kd_accel.schema import ConfigError

PROBE, CLASS_HEAD = "linear_probe", "class_head"
OF_IMAGES = (PROBE, CLASS_HEAD)  # rows beside a set's own, which its name alone does not tell from that one


@dataclass(frozen=True)
class Job:
    """One evaluation set, and what is asked of it."""

    test: EvalSet
    task: Task | None = None  # None: a set without a published name
    train: EvalSet | None = None  # of a linear probe

    @property
    def key(self) -> str:
        """Its name in results.jsonl."""
        return self.test.name

    @property
    def measures(self) -> tuple[str, ...]:
        """The rows that it comes to, as "task" in results.jsonl."""
        return (self.test.kind,) if self.train is None else (self.test.kind, PROBE)


@dataclass(frozen=True)
class Plan:
    """Jobs, and by the key of each task that cannot be done the places where it was looked for."""

    jobs: list[Job]
    skipped: dict[str, list[str]]


def make_plan(config: MeasureConfig) -> Plan:
    """Raises ConfigError for unknown tasks, damaged sets, and when there is nothing to do at all."""
    folders = [config.data] if isinstance(config.data, str) else config.data
    if not config.tasks:
        skipped: dict[str, list[str]] = {}
        tests = _as_tasks(find_sets(folders))
        return Plan([_job(test, TASKS.get(test.name), config, skipped) for test in tests], skipped)
    roots = [Path(folder) for folder in folders]
    if absent := [root for root in roots if not root.is_dir()]:
        raise ConfigError(f"data: {absent[0]}: no such folder")
    jobs, skipped = [], {}
    for task in expand(config.tasks):
        found = find_task(task.key, roots)
        if isinstance(found, list):
            skipped[task.key] = found
        else:
            jobs.append(_job(found, task, config, skipped))
    if not jobs:
        key, places = next(iter(skipped.items()))
        raise ConfigError(
            f"data: none of the {len(skipped)} tasks has its set; of {key}, looked for {', '.join(places)}"
        )
    return Plan(jobs, skipped)


def _as_tasks(tests: list[EvalSet]) -> list[EvalSet]:
    """DataComp's folders take the keys of their tasks, unless another set has that name already."""
    keys = {f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test": key for key in TASKS}
    taken = {test.name for test in tests}
    return [replace(t, name=keys[t.name]) if keys.get(t.name, t.name) not in taken else t for t in tests]


def _job(test: EvalSet, task: Task | None, config: MeasureConfig, skipped: dict[str, list[str]]) -> Job:
    """With a training split where a linear probe is asked for; where there is none, `skipped` gets the places."""
    if config.probe is None or test.kind != "zero_shot":
        return Job(test, task)
    train = find_task(test.name, [test.path.parent], split="train")
    if isinstance(train, list):
        skipped[f"{test.name}, {PROBE}"] = train
        return Job(test, task)
    return Job(test, task, train)
