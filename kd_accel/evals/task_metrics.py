"""The metrics of one zero-shot set: accuracy, what its task adds by group, seen and unseen classes, the main metric.

n images, k columns of metadata, C classes. All tensors are on the CPU and whole on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kd_accel.evals.classification import accuracy, seen_unseen
from kd_accel.evals.groups import FACES, Classify, face_metrics, group_metrics
from kd_accel.evals.tasks import Task
from kd_accel.schema import ConfigError


def metrics_of(
    task: Task | None,
    *,
    labels: Tensor,
    meta: Tensor,
    class_names: Sequence[str],
    templates: Sequence[str],
    classify: Classify,
    seen: Tensor | None = None,
) -> dict[str, float | None]:
    """Metrics by name, with "main_metric": the task's (acc1 without a task), None when no number stands for it.

    labels [n] and meta [n, k] are int64. `classify(class_names, templates)` gives the best classes [n, <= 5] of every
    image, best first; FairFace and UTKFace need four classifiers and no labels. `seen` [C] (bool) are the classes seen
    in training, None when that is no question. Raises ConfigError when the task's metadata is missing.
    """
    if task is not None:
        check_metadata(task, meta)
    if task is not None and task.key in FACES:
        metrics = face_metrics(task.key, meta, class_names, templates, classify)
    else:
        predictions = classify(class_names, templates)
        metrics = accuracy(predictions, labels, num_classes=len(class_names))
        if task is not None:
            metrics |= group_metrics(task.key, predictions, labels, meta, num_classes=len(class_names))
        if seen is not None:
            metrics |= seen_unseen(predictions, labels, seen)
    return metrics | {"main_metric": main_metric(task, metrics)}


def main_metric(task: Task | None, metrics: dict[str, float | None]) -> float | None:
    """The one of `metrics` that stands for the task; acc1 or mean_recall@1 for a set that is no task."""
    if task is not None:
        return None if task.main_metric is None else metrics[task.main_metric]
    return metrics["acc1"] if "acc1" in metrics else metrics["mean_recall@1"]


def check_metadata(task: Task, meta: Tensor) -> None:
    """Raises ConfigError when `meta` [n, k] has fewer columns than the task's metrics read."""
    if meta.shape[1] < len(task.metadata):
        columns = f"{len(task.metadata)} columns ({', '.join(task.metadata)})"
        raise ConfigError(f"{task.key}: KEY.npy beside every image needs {columns}, got {meta.shape[1]}")
