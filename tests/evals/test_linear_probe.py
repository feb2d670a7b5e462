"""The probe is scikit-learn's pipeline, and chooses C without a look at the test images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, recall_score, top_k_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kd_accel.config_files import load
from kd_accel.evals.linear_probe import choose_shots, held_out, linear_probe, search
from kd_accel.probe_config import ProbeConfig
from kd_accel.schema import ConfigError


@pytest.fixture(scope="module")
def digits():
    """(train, test): handwritten digits, 64 pixels each, some of which are always 0; noise makes them hard."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(pixels).float()
    noise = 8 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)) * (pixels.std(0) > 0)
    features, labels = pixels + noise, torch.from_numpy(labels)
    return (features[:500], labels[:500]), (features[500:], labels[500:])


def pipeline(train, c):
    """scikit-learn's probe, converged; its float64 keeps pixels that are always 0 at 0."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-9, max_iter=10_000))
    return model.fit(train[0].double().numpy(), train[1].numpy())


@pytest.mark.parametrize("c", [1e-3, 0.1, 10])
def test_metrics_are_scikit_learns(digits, c):
    """For one C: all metrics of StandardScaler and LogisticRegression, to the last image."""
    train, test = digits
    ours = linear_probe(train, test, ProbeConfig(c=[c]), num_classes=10)
    theirs = pipeline(train, c)
    scores, truths = theirs.predict_proba(test[0].double().numpy()), test[1].numpy()
    recall = pytest.approx(recall_score(truths, scores.argmax(1), average="macro"))
    assert ours == {
        "acc1": pytest.approx(top_k_accuracy_score(truths, scores, k=1)),
        "acc5": pytest.approx(top_k_accuracy_score(truths, scores, k=5)),
        "mean_per_class_recall": recall,
        "balanced_accuracy": recall,
        "f1_macro": pytest.approx(f1_score(truths, scores.argmax(1), average="macro")),
        "c": c,
        "val_acc1": None,
    }


def test_c_is_the_best_one_on_the_held_out_images(digits):
    """As scikit-learn finds it with the same split; order and repetition of the list do not matter."""
    train, test = digits
    config = ProbeConfig(c=[100, 1e-4, 0.03, 1, 1e-4], seed=3, val_fraction=0.3)
    ours = linear_probe(train, test, config, num_classes=10)
    features, labels = StandardScaler().fit_transform(train[0].double().numpy()), train[1].numpy()
    val = held_out(train[1], fraction=0.3, seed=3).numpy()
    accuracies = {
        c: LogisticRegression(C=c, tol=1e-9, max_iter=10_000)
        .fit(features[~val], labels[~val])
        .score(features[val], labels[val])
        for c in config.c
    }
    assert len(set(accuracies.values())) == 4, "the test says nothing where several are best"
    assert ours["c"] == max(accuracies, key=accuracies.get)
    assert ours["val_acc1"] == pytest.approx(max(accuracies.values()))
    refitted = linear_probe(train, test, ProbeConfig(c=[ours["c"]]), num_classes=10)
    assert ours["acc1"] == refitted["acc1"]  # fitted to all training images in the end


def test_test_images_decide_nothing(digits):
    """Other truths: another accuracy, the same C by the same validation."""
    train, (features, labels) = digits
    right, wrong = (
        linear_probe(train, (features, truths), ProbeConfig(), num_classes=10) for truths in (labels, 9 - labels)
    )
    assert right["acc1"] > 0.5 > wrong["acc1"]
    assert (right["c"], right["val_acc1"]) == (wrong["c"], wrong["val_acc1"])


def test_a_search_is_no_worse_than_clips_constant(digits):
    """The C that is found lies on CLIP's grid and is at least as good on the held-out images as C = 0.316 is."""
    train, test = digits
    found = linear_probe(train, test, ProbeConfig(), num_classes=10)
    constants = linear_probe(train, test, ProbeConfig(c=[found["c"], 0.316]), num_classes=10)
    assert constants["c"] == found["c"]
    assert torch.tensor(found["c"]).log10().mul(8).frac().abs() < 1e-5


def test_classes_without_training_images_are_never_predicted(digits):
    """Class 3 of 10 is missing in training: its images are wrong, and the others keep their class numbers."""
    (features, labels), test = digits
    train = features[labels != 3], labels[labels != 3]
    ours = linear_probe(train, test, ProbeConfig(c=[0.1]), num_classes=10)
    theirs = pipeline(train, 0.1).predict(test[0].double().numpy())
    assert ours["acc1"] == pytest.approx((torch.from_numpy(theirs) == test[1]).double().mean().item())


def test_too_few_iterations_are_said(digits, caplog):
    """Of the last fit, with the key to change; those of the search were only to compare values of C."""
    linear_probe(*digits, ProbeConfig(c=[0.1, 1], max_iter=3), num_classes=10)
    assert caplog.text.count("the minimum was not reached, raise probe.max_iter=3") == 1


def test_inputs_are_left_as_they_are(digits):
    """Also features that already are fp64."""
    (features, labels), test = digits
    features = features.double()
    before = features.clone()
    linear_probe((features, labels), test, ProbeConfig(c=[0.1]), num_classes=10)
    assert torch.equal(features, before)


@pytest.mark.parametrize("peak", [-6, -4.75, -0.125, 0, 3.5, 6])
def test_search_finds_a_peak_to_an_eighth_of_a_decade(peak):
    """7 values and 2 more for each of 4 halvings, fewer at the ends; where the score falls off on both sides."""
    tried = []

    def score(c):
        tried.append(c)
        return -abs(torch.tensor(c, dtype=torch.float64).log10().item() - peak)

    assert search(score) == pytest.approx(10**peak)
    assert len(tried) == len(set(tried)) == (11 if abs(peak) == 6 else 15)
    assert min(tried) >= 1e-6
    assert max(tried) <= 1e6


def test_of_equal_scores_the_strongest_penalty_counts():
    """A flat score ends at the least C; a plateau ends at its lower edge."""
    assert search(lambda c: 0.5) == 1e-6
    assert search(lambda c: float(c > 0.05)) == pytest.approx(10**-1.25)  # the first step of 1/8 above 0.05


def test_held_out_rows_are_a_share_of_every_class():
    """At least one of a class of two or more, never the only one; a function of the seed."""
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])[torch.randperm(63)]
    val = held_out(labels, fraction=0.2, seed=0)
    assert labels[val].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert held_out(labels, fraction=0.99, seed=0).logical_not().logical_and(labels != 3).sum() == 3
    assert torch.equal(held_out(labels, fraction=0.2, seed=0), val)
    assert not torch.equal(held_out(labels, fraction=0.2, seed=1), val)


def labelled(*labels: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(key=f"image {i}", label=label) for i, label in enumerate(labels)]


def test_shots_are_so_many_of_each_class():
    """In the order of the set; a class with fewer images gives all of them."""
    samples = labelled(*[0, 1, 2] * 8, 3, 3)
    chosen = choose_shots(samples, shots=4, seed=0)
    assert [sum(sample.label == c for sample in chosen) for c in range(4)] == [4, 4, 4, 2]
    assert chosen == [sample for sample in samples if sample in chosen]


def test_shots_depend_on_seed_and_key_alone():
    """They are drawn before a model is asked, and stay where the others are reordered or gone."""
    samples = labelled(*[0, 1] * 20)
    chosen = choose_shots(samples, shots=3, seed=5)
    rest = [sample for i, sample in enumerate(samples) if sample in chosen or i % 3]
    assert sorted(s.key for s in choose_shots(rest[::-1], shots=3, seed=5)) == sorted(s.key for s in chosen)
    assert choose_shots(samples, shots=3, seed=6) != chosen
    assert choose_shots(samples, shots=2, seed=5) != choose_shots(samples, shots=2, seed=6)


def test_one_image_per_class_leaves_nothing_to_choose_on(digits):
    """Said where the config is read, for shots=1, and else where the set is known; with one C it runs."""
    with pytest.raises(ConfigError, match=r"give one value, for instance c=\[0.316\]"):
        load(ProbeConfig, overrides=["shots=1"])
    one_each = torch.stack([(digits[0][1] == k).nonzero()[0, 0] for k in range(10)])
    train = tuple(part[one_each] for part in digits[0])
    with pytest.raises(ConfigError, match=r"give one value of C, for instance probe.c=\[0.316\]"):
        linear_probe(train, digits[1], ProbeConfig(), num_classes=10)
    assert linear_probe(train, digits[1], ProbeConfig(shots=1, c=[0.316]), num_classes=10)["acc1"] > 0.1


@pytest.mark.parametrize(
    "value", ["c=[]", "c=[0]", "c=[1,-1]", "val_fraction=0", "val_fraction=1", "shots=0", "max_iter=0", "c=0.1"]
)
def test_impossible_values_are_refused(value):
    with pytest.raises(ConfigError, match=value.partition("=")[0]):
        load(ProbeConfig, overrides=[value])
