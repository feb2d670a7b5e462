"""What is measured of an encoder on one evaluation set: features once, then every number that is asked for."""

from __future__ import annotations

import time
from typing import Any

import torch

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.features import SetFeatures, image_features, text_features
from kd_accel.evals.retrieval import recall
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.evals.zero_shot import accuracy, classifier, classify

Metrics = dict[str, float | None]


def measure(encoder: Encoder | Ensemble, eval_set: EvalSet, config: MeasureConfig) -> dict[str, Any]:
    """One row of results.jsonl, alike on every rank (but for its seconds)."""
    start = time.monotonic()
    encoder.require("image", "text")
    samples = eval_set.samples()
    load = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    features = image_features(encoder, eval_set, samples, **load)
    readable = [samples[row] for row in features.rows.tolist()]
    metrics = MEASURES[eval_set.kind](encoder, eval_set, readable, features, config)
    return {
        "model": encoder.name,
        "step": encoder.step,
        "key": eval_set.name,
        "dataset": eval_set.name,
        "task": eval_set.kind,
        "n": len(readable),
        "bad": len(samples) - len(readable),
        "metrics": metrics,
        "weights": f"{encoder.image_id[:16]}-{encoder.text_id[:16]}",
        "seconds": round(time.monotonic() - start, 3),
    }


def _zero_shot(
    encoder: Encoder | Ensemble, eval_set: EvalSet, readable: list[Sample], features: SetFeatures, config: MeasureConfig
) -> Metrics:
    weights = classifier(encoder, eval_set.class_names, eval_set.templates, batch_size=config.batch_size)
    labels = torch.tensor([sample.label for sample in readable])
    return accuracy(classify(encoder.unit(features.images), weights), labels, num_classes=len(weights))


def _retrieval(
    encoder: Encoder | Ensemble, eval_set: EvalSet, readable: list[Sample], features: SetFeatures, config: MeasureConfig
) -> Metrics:
    """An unreadable image takes its captions with it."""
    captions = [caption for sample in readable for caption in sample.captions]
    owner = torch.tensor([image for image, sample in enumerate(readable) for _ in sample.captions])
    texts = text_features(encoder, captions, batch_size=config.batch_size)
    images = encoder.unit(features.images)
    return recall(images, encoder.unit(texts), owner.to(images.device))


MEASURES = {"zero_shot": _zero_shot, "retrieval": _retrieval}  # by EvalSet.kind
