"""The fit is the minimum of the stated function, and so scikit-learn's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from kd_accel.evals import softmax_regression
from kd_accel.evals.softmax_regression import fit, logits, loss_and_gradient

N, D, K = 600, 24, 5


def data(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes of very different sizes: class 0 has half of the rows, class 4 every 32nd."""
    labels = torch.tensor([next(k for k in range(K) if k == K - 1 or i % 2 ** (k + 1)) for i in range(n)])
    centers = torch.randn(K, D, generator=torch.Generator().manual_seed(1))
    return (0.7 * centers[labels] + torch.randn(n, D)).double(), labels


def written_out(weights, features, labels, c):
    """The module's formula in autograd's terms."""
    penalty = weights[:, :-1].square().sum() / 2
    loss = F.cross_entropy(features @ weights[:, :-1].T + weights[:, -1], labels, reduction="sum")
    return (c * loss + penalty) / (c * len(features))


@pytest.mark.parametrize("logits_at_once", [2**24, 7 * K, 1])
def test_gradient_is_autograds(monkeypatch, logits_at_once):
    """Whole, seven rows at a time, one row at a time."""
    monkeypatch.setattr(softmax_regression, "LOGITS_AT_ONCE", logits_at_once)
    features, labels = data(50)
    weights = torch.randn(K, D + 1, dtype=torch.float64, requires_grad=True)
    expected = written_out(weights, features, labels, c=0.3)
    expected.backward()
    loss, gradient = loss_and_gradient(weights.detach(), features, labels, c=0.3)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, weights.grad)


@pytest.mark.parametrize("c", [1e-4, 0.01, 0.316, 10])
def test_weights_are_scikit_learns(c):
    """Where the penalty is the loss and where it is next to nothing, for classes of very different sizes.

    The function is strongly convex in W: weights whose gradient is g are within |g| C n of the minimum; scikit-learn's
    gradient is driven to 1e-10. Probabilities then differ by less than 0.001.
    """
    features, labels = data()
    ours, converged = fit(features, labels, c=c, max_iter=1000)
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(features.numpy(), labels.numpy())
    _, gradient = loss_and_gradient(ours, features, labels, c=c)
    bound = gradient.norm().item() * c * N + 1e-6
    assert converged
    torch.testing.assert_close(ours[:, :-1], torch.from_numpy(theirs.coef_), atol=bound, rtol=0)
    unseen, _ = data()
    assert logits(ours, unseen).argmax(1).tolist() == theirs.predict(unseen.numpy()).tolist()
    probabilities = torch.from_numpy(theirs.predict_proba(unseen.numpy()))
    torch.testing.assert_close(logits(ours, unseen).softmax(1), probabilities, atol=1e-3, rtol=0)


def test_start_changes_nothing():
    """From anywhere, the same minimum."""
    features, labels = data()
    cold, _ = fit(features, labels, c=0.1, max_iter=1000)
    warm, _ = fit(features, labels, c=0.1, max_iter=1000, start=torch.randn(K, D + 1, dtype=torch.float64))
    torch.testing.assert_close(warm[:, :-1], cold[:, :-1], atol=1e-4, rtol=0)


def test_too_few_iterations_are_told():
    features, labels = data()
    assert not fit(features, labels, c=10, max_iter=3)[1]


def test_one_class_is_always_right():
    """The softmax over one class is 1, whatever the weights."""
    weights, _ = fit(torch.randn(4, D).double(), torch.zeros(4, dtype=torch.int64), c=1, max_iter=10)
    assert weights.shape == (1, D + 1)
    assert not weights.any()
