"""Classification metrics are scikit-learn's, also where classes are missing; seen and unseen classes are told apart."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, recall_score, top_k_accuracy_score

from kd_accel.evals.classification import accuracy, best_classes, seen_mask, seen_unseen
from kd_accel.schema import ConfigError

NUM_CLASSES = 9
# labels, classes that are never the best one
CASES = {
    "all classes": (torch.arange(300) % NUM_CLASSES, []),
    "a class without images": (torch.arange(300) % (NUM_CLASSES - 1), []),
    "a class never predicted": (torch.arange(300) % NUM_CLASSES, [3]),
    "neither image nor prediction": (torch.arange(300) % (NUM_CLASSES - 1), [NUM_CLASSES - 1]),
    "one class only": (torch.full((50,), 4), []),
    "one image": (torch.tensor([2]), []),
}


@pytest.mark.parametrize(("labels", "never"), CASES.values(), ids=CASES)
def test_metrics_equal_scikit_learn(labels, never):
    """A class that occurs nowhere counts in no mean; one that is only predicted counts in f1_macro."""
    logits = torch.randn(len(labels), NUM_CLASSES) + torch.nn.functional.one_hot(labels, NUM_CLASSES)
    logits[:, never] = -10
    best = logits.argmax(1)
    ours = accuracy(best_classes(logits), labels, num_classes=NUM_CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and never occur
        expected = {
            "acc1": top_k_accuracy_score(labels, logits, k=1, labels=range(NUM_CLASSES)),
            "acc5": top_k_accuracy_score(labels, logits, k=5, labels=range(NUM_CLASSES)),
            "mean_per_class_recall": recall_score(labels, best, labels=labels.unique(), average="macro"),
            "balanced_accuracy": balanced_accuracy_score(labels, best),
            "f1_macro": f1_score(labels, best, average="macro"),
        }
    assert ours == pytest.approx(expected, rel=1e-12)


def test_acc5_needs_five_classes():
    """Four classes have no acc5; five have one, and it is 1."""
    labels = torch.arange(4)
    assert accuracy(best_classes(torch.randn(4, 4)), labels, num_classes=4)["acc5"] is None
    assert accuracy(best_classes(torch.randn(4, 5)), labels, num_classes=5)["acc5"] == 1


def test_equal_logits_go_to_the_lowest_class():
    """A constant row, long enough for an unstable sort to permute it, is classified as 0, 1, 2, 3, 4."""
    assert best_classes(torch.zeros(3, 2000)).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_seen_and_unseen_are_per_class_means():
    """A frequent class weighs as much as a rare one (Xian et al.), and all classes compete for every image."""
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 3])
    best = torch.tensor([0, 0, 0, 2, 0, 2, 0, 3])  # recalls 3/4, 0 | 1/2, 1
    metrics = seen_unseen(best[:, None], labels, torch.tensor([True, True, False, False]))
    seen, unseen = (3 / 4 + 0) / 2, (1 / 2 + 1) / 2
    harmonic = 2 / (1 / seen + 1 / unseen)
    assert metrics == pytest.approx({"acc_seen": seen, "acc_unseen": unseen, "harmonic_mean": harmonic})


def test_nothing_right_has_the_harmonic_mean_zero():
    labels = torch.tensor([0, 1])
    metrics = seen_unseen(labels.flip(0)[:, None], labels, torch.tensor([True, False]))
    assert metrics == {"acc_seen": 0, "acc_unseen": 0, "harmonic_mean": 0}


def test_without_images_of_unseen_classes_there_is_no_harmonic_mean():
    labels = torch.tensor([0, 0])
    metrics = seen_unseen(labels[:, None], labels, torch.tensor([True, False]))
    assert metrics == {"acc_seen": 1, "acc_unseen": None, "harmonic_mean": None}


def test_seen_classes_are_found_by_name():
    names = ("tench", "cat", "dog")
    assert seen_mask(names, ["dog", "tench"], name="pets").tolist() == [True, False, True]
    with pytest.raises(ConfigError, match="^seen_classes: 'cats' is no class of pets; did you mean 'cat'\\?$"):
        seen_mask(names, ["dog", "cats"], name="pets")
