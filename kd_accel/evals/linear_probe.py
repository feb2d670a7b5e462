"""Linear probe: how well a linear classifier on frozen image features does (arXiv:2103.00020, appendix A.3).

Every feature is standardised by the training images, so that one C suits all; C is chosen on a part of the training
images, and the classifier is then fitted to all of them. The test images are looked at once, at the end. (ProtoCLIP's
probe, a hundred epochs of SGD of which the best on the test images counts, chooses by them; its numbers are higher for
that and are not reproduced.)

Every rank has all features and computes the same; none waits for another. n images, d width, K classes that occur.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from kd_accel import distributed
from kd_accel.evals.bars import bar
from kd_accel.evals.classification import accuracy, best_classes
from kd_accel.evals.softmax_regression import fit, logits
from kd_accel.probe_config import ProbeConfig
from kd_accel.schema import ConfigError

log = logging.getLogger(__name__)

DECADE = 8  # steps of CLIP's grid in one
LAST = 6 * DECADE  # C = 10^-6 ... 10^6
COARSE = 2 * DECADE
CHUNK_ROWS = 4096  # test images whose logits exist at a time

Labelled = tuple[Tensor, Tensor]  # features [n, d] of any precision, labels [n] int64


def linear_probe(train: Labelled, test: Labelled, config: ProbeConfig, *, num_classes: int) -> dict[str, float | None]:
    """acc1, acc5, mean_per_class_recall on `test`, the `c` that was chosen and `val_acc1`, by which (None: no choice).

    Computed in fp64 where the features of `train` lie. A class without training images is never predicted. Raises
    ConfigError where C is to be chosen and every class has a single training image.
    """
    features, labels = train[0].to(torch.float64, copy=True), train[1].to(train[0].device)
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    deviation = torch.where(deviation == 0, 1.0, deviation)  # of a feature that says nothing
    features.sub_(mean).div_(deviation)
    classes, labels = labels.unique(return_inverse=True)
    c, val_acc1, weights = _choose_c(features, labels, config)
    weights, converged = fit(features, labels, c=c, max_iter=config.max_iter, start=weights)
    if not converged and distributed.is_main():
        log.warning("linear probe with C=%g: the minimum was not reached, raise probe.max_iter=%d", c, config.max_iter)
    chunks = test[0].to(features.device).split(CHUNK_ROWS)
    best = torch.cat([best_classes(logits(weights, (rows.double() - mean) / deviation)) for rows in chunks])
    metrics = accuracy(classes[best].cpu(), test[1].cpu(), num_classes=num_classes)
    return {**metrics, "c": c, "val_acc1": val_acc1}


def choose_shots(samples: list, *, shots: int, seed: int) -> list:
    """`shots` samples of each class, fewer where a class has no more, in their own order.

    Drawn by (seed, key) alone: neither the model nor the other samples of the set matter.
    """
    by_class = defaultdict(list)
    for row, sample in enumerate(samples):
        draw = hashlib.sha256(f"{seed} {sample.key}".encode()).digest()
        by_class[sample.label].append((draw, row))
    chosen = sorted(row for draws in by_class.values() for _, row in sorted(draws)[:shots])
    return [samples[row] for row in chosen]


def held_out(labels: Tensor, *, fraction: float, seed: int) -> Tensor:  # [n] bool
    """Which rows C is chosen on: `fraction` of each class, one at least, but never a class's only row."""
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for rows in by_class.split(labels.bincount().tolist()):
        chosen[rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)]] = True
    return chosen


def search(score: Callable[[float], float]) -> float:
    """CLIP's binary search for the C of the highest score: seven values two decades apart, then half the distance on
    both sides of the best one, down to an eighth of a decade. Of equal scores the smallest C, the strongest penalty.
    """
    scores = {step: score(10 ** (step / DECADE)) for step in range(-LAST, LAST + 1, COARSE)}
    distance = COARSE
    while distance > 1:
        distance //= 2
        best = _best(scores)
        for step in (best - distance, best + distance):
            if abs(step) <= LAST:
                scores[step] = score(10 ** (step / DECADE))
    return 10 ** (_best(scores) / DECADE)


def _best(scores: dict) -> float:
    return max(sorted(scores), key=scores.get)


def _choose_c(features: Tensor, labels: Tensor, config: ProbeConfig) -> tuple[float, float | None, Tensor | None]:
    """(C, its accuracy on the held-out rows, weights to start the last fit from); Nones where one C is given."""
    if config.c is not None and len(config.c) == 1:
        return config.c[0], None, None
    val = held_out(labels, fraction=config.val_fraction, seed=config.seed).to(labels.device)
    if not val.any():
        raise ConfigError(
            "probe: no class of the training set has a second image to choose C on: give one value of C, for instance"
            " probe.c=[0.316]"
        )
    x, y, weights, scores = features[~val], labels[~val], None, {}
    fits = bar(desc="linear probe", unit="fit")

    def score(c: float) -> float:
        nonlocal weights
        weights, _ = fit(x, y, c=c, max_iter=config.max_iter, start=weights)
        scores[c] = (logits(weights, features[val]).argmax(dim=1) == labels[val]).double().mean().item()
        fits.update()
        return scores[c]

    with fits:
        c = search(score) if config.c is None else _best({c: score(c) for c in sorted(config.c)})
    return c, scores[c], weights
