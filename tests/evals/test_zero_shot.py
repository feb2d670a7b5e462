"""Zero-shot metrics agree with scikit-learn and with the formulas of CLIP and DataComp."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals import zero_shot
from kd_accel.evals.classification import accuracy, best_classes
from kd_accel.evals.features import text_features
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import OnSet, measure
from kd_accel.evals.plan import Job
from kd_accel.evals.zero_shot import classifier, classify


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


@pytest.mark.parametrize(("limit", "prompts", "rows"), [(2, 3, 1), (7, 6, 1), (50, 33, 4)])
def test_many_classes_are_done_a_few_at_a_time(encoder, monkeypatch, limit, prompts, rows):
    """Their prompts are never all together, nor are all logits; at least those of a class, and of an image."""
    names, templates = tuple(f"thing {i}" for i in range(11)), ("a photo of a {c}.", "{c}", "one {c}")
    images = F.normalize(torch.randn(23, encoder.embed_dim), dim=-1)
    whole = classifier(encoder, names, templates, batch_size=64)
    expected = classify(images, whole)
    encoded, compared = [], []
    spies = {
        "text_features": lambda encoder, texts, **load: (
            encoded.append(len(texts)) or text_features(encoder, texts, **load)
        ),
        "best_classes": lambda logits: compared.append(len(logits)) or best_classes(logits),
    }
    for name, value in {**spies, "PROMPTS": limit, "LOGITS": limit}.items():
        monkeypatch.setattr(zero_shot, name, value)
    torch.testing.assert_close(classifier(encoder, names, templates, batch_size=64), whole)
    assert classify(images, whole).equal(expected)
    assert (max(encoded), sum(encoded)) == (prompts, 33)
    assert (max(compared), sum(compared)) == (rows, 23)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_set_is_classified_row_by_row(encoder, tmp_path, write_benchmark, labelled, num_workers):
    """The predictions of batches over several tars are those of one image at a time."""
    labels = [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1]
    samples = list(labelled(labels).items())
    folder = write_benchmark(tmp_path / "set", dict(samples[:7]), dict(samples[7:]), num_classes=6)
    [eval_set] = find_sets(folder)
    config = MeasureConfig(data=str(folder), batch_size=4, num_workers=num_workers)
    row = measure(OnSet(encoder, Job(eval_set), config), "zero_shot")

    from kd_accel.data.transforms import decode, eval_view

    weights = encoder.encode_texts([t.format(c=f"thing {i}") for i in range(6) for t in ("a photo of a {c}.", "{c}")])
    weights = F.normalize(weights, dim=-1)
    weights = F.normalize(weights[::2] + weights[1::2], dim=-1)
    views = [eval_view(decode(members["png"]), encoder.image_input)[None] for _, members in samples]
    logits = torch.cat([encoder.encode_images(view) @ weights.T for view in views])
    assert row["n"] == len(labels)
    expected = accuracy(logits.topk(5, dim=1).indices, torch.tensor(labels), num_classes=6)
    assert row["metrics"] == {**expected, "main_metric": expected["acc1"]}
