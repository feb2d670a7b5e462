"""One model on one evaluation set: its features once, and every number that is asked for.

n readable images, m captions, C classes, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kd_accel import distributed
from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.agreement import feature_agreement, top1_match
from kd_accel.evals.classification import accuracy, seen_mask, seen_unseen
from kd_accel.evals.clusters import cluster_agreement
from kd_accel.evals.coco_keys import coco_keys
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.feature_cache import FeatureCache, fingerprint
from kd_accel.evals.features import SetFeatures
from kd_accel.evals.groups import FACES, face_metrics, group_metrics
from kd_accel.evals.linear_probe import choose_shots, linear_probe
from kd_accel.evals.plan import CLASS_HEAD, OF_IMAGES, PROBE, Job
from kd_accel.evals.results import Row, weights_of
from kd_accel.evals.retrieval import recall
from kd_accel.evals.sets import EvalSet, Sample, SetError
from kd_accel.evals.statistics import feature_statistics
from kd_accel.evals.winogavil import evaluate_winogavil, prompt
from kd_accel.evals.zero_shot import best_by, classify
from kd_accel.models.class_embeddings import read_names
from kd_accel.schema import ConfigError

Metrics = dict[str, float | None]
MAIN = {
    "zero_shot": "acc1",
    "retrieval": "mean_recall@1",
    "winogavil": "jaccard_score_10-12",
    PROBE: "acc1",
    CLASS_HEAD: "acc1",
}


class OnSet:
    """A model on a set: everything is computed once, when it is asked for. All ranks ask alike, in the same order."""

    def __init__(self, encoder: Encoder | Ensemble, job: Job, config: MeasureConfig, *, teacher: Encoder | None = None):
        self.encoder, self.job, self.config = encoder, job, config
        self.teacher = None if teacher is None else OnSet(teacher, job, config)
        self._cache = FeatureCache(config.cache)

    def options(self, what: str) -> str:
        """A fingerprint of all that decides a row beside the model: another one asks for a new row."""
        test, config = self.job.test, self.config
        seen = config.seen_classes and read_names(Path(config.seen_classes), "seen_classes")
        if what == PROBE:
            asked = [config.probe.model_dump(), str(self.job.train.path.resolve())]
        elif what == CLASS_HEAD:
            asked = [test.class_names, seen, self.encoder.class_head.id]
        else:
            asked = [test.class_names, test.templates, seen, config.statistics, config.clusters]
            asked.append(self.teacher and weights_of(self.teacher.encoder))
        asked.append(self._content)
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    @cached_property
    def _content(self) -> str:
        """A fingerprint of the set as the main rank finds it: another folder of its name, or a repaired file, changes
        it."""
        truths = [(sample.label, sample.captions, sample.meta) for sample in self.samples]
        found = hashlib.sha256(f"{fingerprint(self.job.test, self.samples)} {truths}".encode())
        return distributed.from_main(found.hexdigest())

    @cached_property
    def samples(self) -> list[Sample]:
        """Of the set, readable or not. Raises SetError on every rank for what one finds wrong."""
        return _read(self.job.test.samples)

    @cached_property
    def features(self) -> SetFeatures:
        """Of its images. Raises SetError where none is readable, ConfigError for features that are not finite."""
        return self._features(self.job.test, self.samples)

    @cached_property
    def readable(self) -> list[Sample]:  # [n]
        return [self.samples[row] for row in self.features.rows.tolist()]

    @cached_property
    def labels(self) -> Tensor:  # [n] int64
        """Raises SetError where a sample has none."""
        if lacking := [sample.key for sample in self.samples if sample.label is None]:
            raise SetError(f"{self.job.test.path}: {lacking[0]}.cls, the class index, is missing")
        return torch.tensor([sample.label for sample in self.readable])

    @cached_property
    def predictions(self) -> Tensor:  # [n, <= 5]
        """The best classes of every image, best first."""
        return self.classify(self.job.test.class_names, self.job.test.templates)

    @cached_property
    def owner(self) -> Tensor:  # [m] int64: the image that a caption describes
        owner = [image for image, sample in enumerate(self.readable) for _ in sample.captions]
        return torch.tensor(owner, device=self.features.images.device)

    @cached_property
    def captions(self) -> list[str]:
        """An unreadable image takes its captions with it."""
        return [caption for sample in self.readable for caption in sample.captions]

    @cached_property
    def texts(self) -> Tensor:  # [m, d] raw
        """Features of the captions. Raises ConfigError for texts that the encoder does not know."""
        return self.encode_texts(self.captions)

    @property
    def unit_images(self) -> Tensor:  # [n, d]
        return self.encoder.unit(self.features.images)

    @property
    def unit_texts(self) -> Tensor:  # [m, d]
        return self.encoder.unit(self.texts)

    def classify(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:  # [n, <= 5]
        """The best classes of every image."""
        weights = self._cache.classifier(
            self.encoder, tuple(class_names), tuple(templates), batch_size=self.config.batch_size
        )
        return classify(self.unit_images, weights)

    def encode_texts(self, texts: list[str]) -> Tensor:
        return self._cache.text_features(self.encoder, texts, batch_size=self.config.batch_size)

    def training_set(self) -> tuple[Tensor, Tensor]:
        """(raw features, labels) of the linear probe's training images."""
        train, probe = self.job.train, self.config.probe
        if train.class_names != self.job.test.class_names:  # a class folder is missing, and indices mean other classes
            raise SetError(f"{train.path}: its training split has other classes than its test split")
        samples = _read(train.samples)
        if probe.shots is not None:
            samples = choose_shots(samples, shots=probe.shots, seed=probe.seed)
        found = self._features(train, samples)
        return found.images, torch.tensor([samples[row].label for row in found.rows.tolist()])

    def _features(self, eval_set: EvalSet, samples: list[Sample]) -> SetFeatures:
        load = {"batch_size": self.config.batch_size, "num_workers": self.config.num_workers}
        return self._cache.image_features(self.encoder, eval_set, samples, **load)


def _read(read: Callable[[], list]) -> list:
    """What is read of a set; what one rank finds wrong, every rank raises as SetError."""
    try:
        with distributed.failing_together():
            return read()
    except ConfigError as error:
        raise SetError(str(error)) from None


def measures_of(encoder: Encoder | Ensemble, job: Job) -> tuple[str, ...]:
    """The rows that a job comes to; its class head and a linear probe are all that an image tower alone can be asked
    for. A head beside a text tower is asked about the classes that it knows."""
    if job.test.kind != "zero_shot":
        return job.measures
    head, alone = encoder.class_head, "text" not in encoder.towers
    asked = head is not None and (alone or head.columns(job.test.class_names) is not None)
    own = (CLASS_HEAD,) * asked + (PROBE,) * (job.train is not None)
    return own if alone and own else (job.test.kind, *own)


def measure(on_set: OnSet, what: str) -> Row:
    """One row of results.jsonl, alike on every rank (but for its seconds): `what` is one of the job's measures.

    Raises ConfigError, on every rank, for a set or a model that cannot be evaluated.
    """
    start = time.monotonic()
    encoder, job = on_set.encoder, on_set.job
    encoder.require(*(("image",) if what in OF_IMAGES else ("image", "text")))
    metrics = MEASURES[what](on_set)
    if on_set.teacher is not None and what in ("zero_shot", "retrieval"):
        metrics |= _agreement(on_set, on_set.teacher, what)
    main = MAIN[what] if job.task is None or what in OF_IMAGES else job.task.main_metric
    return {
        "model": encoder.name,
        "step": encoder.step,
        "key": job.key,
        "dataset": job.task.title if job.task else job.key,
        "task": what,
        "n": len(on_set.readable),
        "bad": len(on_set.samples) - len(on_set.readable),
        "metrics": metrics | {"main_metric": None if main is None else metrics[main]},
        "weights": weights_of(encoder),
        "options": on_set.options(what),
        "seconds": round(time.monotonic() - start, 3),
    }


def _zero_shot(on_set: OnSet) -> Metrics:
    test, key = on_set.job.test, on_set.job.key
    if key in FACES:
        return face_metrics(key, _metadata(on_set), test.class_names, test.templates, on_set.classify)
    metrics = _classification(on_set, on_set.predictions)
    if on_set.config.clusters:
        metrics |= cluster_agreement(on_set.unit_images, on_set.labels, num_classes=len(test.class_names))
    return metrics


def _class_head(on_set: OnSet) -> Metrics:
    """Of its classes those of the set compete."""
    head, names = on_set.encoder.class_head, on_set.job.test.class_names
    columns = head.columns(names)
    if columns is None:
        strange = [name for name in names if head.names is not None and head.columns([name]) is None]
        raise SetError(
            f"{on_set.job.test.path}: {len(names)} classes"
            + (f", of which {len(strange)} ({strange[0]}, ...)" if strange else "")
            + f" are not those of the class head of {on_set.encoder.title}, which knows {len(head.bias)}"
        )
    best = best_by(lambda rows: head.logits(rows)[:, columns], on_set.features.images, num_classes=len(head.bias))
    return _classification(on_set, best)


def _classification(on_set: OnSet, predictions: Tensor) -> Metrics:
    """Of `predictions` [n, <= 5], the best classes of every image."""
    names, key, meta = on_set.job.test.class_names, on_set.job.key, _metadata(on_set)
    metrics = accuracy(predictions, on_set.labels, num_classes=len(names))
    metrics |= group_metrics(key, predictions, on_set.labels, meta, num_classes=len(names))
    if on_set.config.seen_classes is not None:
        seen = seen_mask(names, read_names(Path(on_set.config.seen_classes), "seen_classes"), name=key)
        metrics |= seen_unseen(predictions, on_set.labels, seen)
    return metrics


def _metadata(on_set: OnSet) -> Tensor:  # [n, k] int64
    """The columns by which the task groups its images; none for most. Raises SetError where the set has fewer."""
    task = on_set.job.task
    columns = task.metadata if task else ()
    if lacking := [sample.key for sample in on_set.samples if len(sample.meta) < len(columns)]:
        raise SetError(f"{on_set.job.test.path}: {lacking[0]}.npy: {task.key} needs the columns {', '.join(columns)}")
    return torch.tensor([sample.meta[: len(columns)] for sample in on_set.readable], dtype=torch.int64)


def _retrieval(on_set: OnSet) -> Metrics:
    images, texts = on_set.unit_images, on_set.unit_texts
    metrics = recall(images, texts, on_set.owner)
    if on_set.job.key == "coco":
        metrics |= coco_keys(metrics, images, texts, on_set.owner)
    if on_set.config.statistics:
        metrics |= feature_statistics(images, texts, on_set.owner)
    return metrics


def _winogavil(on_set: OnSet) -> Metrics:
    questions = _read(on_set.job.test.questions)
    cues = on_set.encoder.unit(on_set.encode_texts([prompt(question.cue) for question in questions]))
    return evaluate_winogavil(on_set.unit_images, on_set.features.rows, cues, questions)


def _probe(on_set: OnSet) -> Metrics:
    test = on_set.features.images, on_set.labels
    num_classes = len(on_set.job.test.class_names)
    return linear_probe(on_set.training_set(), test, on_set.config.probe, num_classes=num_classes)


def _agreement(student: OnSet, teacher: OnSet, what: str) -> Metrics:
    """What of a set both say alike; of texts, and of the classes they name, where the teacher has a text tower."""
    if not student.features.rows.equal(teacher.features.rows):
        raise SetError(f"{student.job.test.path}: some images could be read once and not again: is it changing?")
    metrics = feature_agreement(student.unit_images, teacher.unit_images)
    if "text" not in teacher.encoder.towers:
        return metrics
    if what == "zero_shot":
        return metrics | top1_match(student.predictions, teacher.predictions)
    return metrics | feature_agreement(student.unit_texts, teacher.unit_texts, of="text")


MEASURES = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "winogavil": _winogavil,
    PROBE: _probe,
    CLASS_HEAD: _class_head,
}
