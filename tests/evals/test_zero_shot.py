"""Zero-shot metrics agree with scikit-learn and with the formulas of CLIP and DataComp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import recall_score, top_k_accuracy_score

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import measure
from kd_accel.evals.zero_shot import accuracy, best_classes, classifier


def test_metrics_equal_scikit_learn():
    """acc1, acc5 and the mean recall over the classes that occur are scikit-learn's."""
    logits = torch.randn(300, 9)
    labels = torch.randint(0, 8, (300,))  # class 8 never occurs
    ours = accuracy(best_classes(logits), labels, num_classes=9)
    assert ours["acc1"] == pytest.approx(top_k_accuracy_score(labels, logits, k=1, labels=range(9)))
    assert ours["acc5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(9)))
    per_class = recall_score(labels, logits.argmax(1), labels=range(8), average="macro")
    assert ours["mean_per_class_recall"] == pytest.approx(per_class)


def test_acc5_needs_five_classes():
    """Four classes have no acc5; five have one, and it is 1."""
    labels = torch.arange(4)
    assert accuracy(best_classes(torch.randn(4, 4)), labels, num_classes=4)["acc5"] is None
    assert accuracy(best_classes(torch.randn(4, 5)), labels, num_classes=5)["acc5"] == 1


def test_equal_logits_go_to_the_lowest_class():
    """A constant row, long enough for an unstable sort to permute it, is classified as 0, 1, 2, 3, 4."""
    assert best_classes(torch.zeros(3, 2000)).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_classifier_is_the_renormalised_mean_of_normalised_prompts(encoder):
    """Prompts are weighted alike whatever the length of their embeddings; braces of a class name are left alone."""
    names, templates = ("red {square}", "green circle", "blue"), ("a photo of a {c}.", "{c}")
    ours = classifier(encoder, names, templates, batch_size=4)
    for row, name in zip(ours, names, strict=True):
        prompts = [f"a photo of a {name}.", name]
        with torch.no_grad():
            raw = encoder.text.model.encode_text(encoder.text.wants.tokenize(prompts))
        mean = sum(vector / vector.norm() for vector in raw)
        torch.testing.assert_close(row, F.normalize(mean, dim=0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_is_classified_row_by_row(encoder, tmp_path, write_benchmark, labelled, num_workers):
    """The predictions of batches over several tars are those of one image at a time."""
    labels = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1]
    samples = list(labelled(labels).items())
    folder = write_benchmark(tmp_path / "set", dict(samples[:7]), dict(samples[7:]), num_classes=6)
    [eval_set] = find_sets(folder)
    row = measure(encoder, eval_set, MeasureConfig(data=str(folder), batch_size=4, num_workers=num_workers))

    from kd_accel.data.transforms import decode, eval_view

    weights = encoder.encode_texts([t.format(c=f"thing {i}") for i in range(6) for t in ("a photo of a {c}.", "{c}")])
    weights = F.normalize(weights, dim=-1)
    weights = F.normalize(weights[::2] + weights[1::2], dim=-1)
    views = [eval_view(decode(members["png"]), encoder.image_input)[None] for _, members in samples]
    logits = torch.cat([encoder.encode_images(view) @ weights.T for view in views])
    assert row["n"] == len(labels)
    assert row["metrics"] == accuracy(logits.topk(5, dim=1).indices, torch.tensor(labels), num_classes=6)
