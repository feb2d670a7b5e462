"""Metrics of classification, from the best classes of every image; each equals scikit-learn's of the same name.

n images, C classes. Shares are 0..1, sums are float64. A class that no metric can say anything about is left out of
means over classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_accel.schema import ConfigError, did_you_mean


def best_classes(logits: Tensor) -> Tensor:  # [n, C] -> [n, min(5, C)] int64
    """The five best classes of each row, best first; of equal logits the lower class index comes first."""
    logits, best = logits.clone(), []
    for _ in range(min(5, logits.shape[1])):
        best.append(logits.argmax(dim=1, keepdim=True))  # the first of equals, which topk does not promise
        logits.scatter_(1, best[-1], float("-inf"))
    return torch.cat(best, dim=1)


def accuracy(predictions: Tensor, labels: Tensor, *, num_classes: int) -> dict[str, float | None]:
    """Metrics of `predictions` [n, <= 5], best first, for `labels` [n]; acc5 is None below five classes.

    mean_per_class_recall is the mean over the classes that occur in `labels`, as in DataComp; balanced_accuracy is
    scikit-learn's name for it. f1_macro is the mean over the classes that occur or are predicted.
    """
    hits = predictions == labels[:, None]
    best = predictions[:, 0]
    recall = recall_per_class(best, labels, num_classes=num_classes).nanmean().item()
    return {
        "acc1": hits[:, 0].double().mean().item(),
        "acc5": hits.any(1).double().mean().item() if num_classes >= 5 else None,
        "mean_per_class_recall": recall,
        "balanced_accuracy": recall,
        "f1_macro": f1_per_class(best, labels, num_classes=num_classes).nanmean().item(),
    }


def recall_per_class(best: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:  # [C] float64
    """Share of the images of each class that are predicted (`best` [n]) as such; nan for a class without images."""
    correct = labels[best == labels].bincount(minlength=num_classes).double()
    return correct / labels.bincount(minlength=num_classes)


def f1_per_class(best: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:  # [C] float64
    """2 TP / (images of the class + images predicted as it); nan for a class that is in neither."""
    correct = labels[best == labels].bincount(minlength=num_classes).double()
    return 2 * correct / (labels.bincount(minlength=num_classes) + best.bincount(minlength=num_classes))


def seen_unseen(predictions: Tensor, labels: Tensor, seen: Tensor) -> dict[str, float | None]:
    """Generalised zero-shot learning (arXiv:1707.00600, section 3.2): all classes compete, accuracy is told apart.

    acc_seen and acc_unseen are means of per-class top-1 accuracies over the classes that are `seen` [C] (bool) in
    training and over the others; harmonic_mean is theirs. None where there is no image of such a class.
    """
    recall = recall_per_class(predictions[:, 0], labels, num_classes=len(seen))
    acc_seen, acc_unseen = (_mean(recall[which]) for which in (seen, ~seen))
    both = None
    if acc_seen is not None and acc_unseen is not None:
        both = 2 * acc_seen * acc_unseen / (acc_seen + acc_unseen) if acc_seen + acc_unseen else 0.0
    return {"acc_seen": acc_seen, "acc_unseen": acc_unseen, "harmonic_mean": both}


def seen_mask(class_names: Sequence[str], seen_names: Sequence[str], *, name: str) -> Tensor:  # [C] bool
    """Which classes of the set `name` were seen in training; raises ConfigError for a name that is none of them."""
    if foreign := [seen for seen in seen_names if seen not in class_names]:
        hint = did_you_mean(foreign[0], class_names) if len(class_names) <= 20 else ""
        raise ConfigError(f"seen_classes: '{foreign[0]}' is no class of {name}{hint}")
    return torch.tensor([name in set(seen_names) for name in class_names])


def _mean(values: Tensor) -> float | None:
    """Without nan; None of nothing."""
    values = values[~values.isnan()]
    return values.mean().item() if len(values) else None
