"""Zero-shot classification as in CLIP (arXiv:2103.00020, section 3.1) and DataComp: prompts are the classifier.

n images, C classes, P prompt templates, d embedding width. Neither all n x C logits nor, where they are many, the
features of all C x P prompts exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_accel.evals.bars import bar
from kd_accel.evals.classification import best_classes
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.features import in_chunks, text_features

PROMPTS = 16_384  # of so many, about, features exist at a time
ROWS, LOGITS = 1024, 2**24  # images and logits at a time, at most; malloc keeps blocks below 32 MiB, and they pile up


def classifier(
    encoder: Encoder | Ensemble, class_names: tuple[str, ...], templates: tuple[str, ...], *, batch_size: int
) -> Tensor:  # [C, d]
    """One unit row per class: the mean of its normalised prompts, normalised again."""
    templates = encoder.templates(class_names, templates)
    size = max(1, PROMPTS // len(templates))  # classes
    chunks = [class_names[start : start + size] for start in range(0, len(class_names), size)]
    return torch.cat([_class_rows(encoder, names, templates, batch_size) for names in bar(chunks, desc="prompts")])


def _class_rows(
    encoder: Encoder | Ensemble, class_names: tuple[str, ...], templates: tuple[str, ...], batch_size: int
) -> Tensor:  # [C, d]
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    features = encoder.unit(text_features(encoder, prompts, batch_size=batch_size))  # [C * P, d]
    return encoder.unit(features.unflatten(0, (len(class_names), len(templates))).mean(1))


def classify(images: Tensor, weights: Tensor) -> Tensor:
    """[n, d] unit rows, [C, d] classifier -> [n, min(5, C)] int64 on the CPU, on every rank: the best classes."""
    return best_by(lambda rows: 100 * rows @ weights.T, images, num_classes=len(weights))


def best_by(logits: Callable[[Tensor], Tensor], images: Tensor, *, num_classes: int) -> Tensor:
    """The same of [n, d] rows by what `logits` makes of some of them: [b, d] -> [b, C]."""

    def best(rows: range) -> Tensor:
        return best_classes(logits(images[rows.start : rows.stop]))

    chunk_rows = max(1, min(ROWS, LOGITS // num_classes))
    return in_chunks(len(images), best, chunk_rows=chunk_rows).cpu()
