"""Clusters of another modality: against their definitions as loops, finite differences, and samples without one.

b rows, E samples of an episode, K clusters, d and e widths.
"""

from __future__ import annotations

import math

import pytest
import torch

from kd_accel.losses import prototypes

SCALE = torch.tensor(1 / 0.07, dtype=torch.float64)
LABELS = torch.tensor([2, 0, 2, 3, 0, -1, 2])
CLUSTERS = 5  # of which 1 and 4 are empty


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _batch() -> tuple[torch.Tensor, ...]:
    """rows [b, d], centroids [K, d], labels [b], target centroids [K, e]."""
    return 0.3 * _randn(4, 3), 0.3 * _randn(CLUSTERS, 3), torch.tensor([3, 0, 4, 3]), 0.3 * _randn(CLUSTERS, 6)


def test_cluster_means_are_their_definition():
    """The mean of the features of a cluster, not made a unit vector; 0 where nobody is; -1 counts nowhere."""
    features = _randn(7, 3)
    slow = torch.zeros(CLUSTERS, 3, dtype=torch.float64)
    for cluster in range(CLUSTERS):
        members = [features[i] for i in range(7) if LABELS[i] == cluster]
        if members:
            slow[cluster] = sum(members) / len(members)
    torch.testing.assert_close(prototypes.cluster_means(features, LABELS, CLUSTERS), slow)


def test_cluster_means_take_the_labels_of_a_memory():
    """Which are int32."""
    features = _randn(7, 3)
    expected = prototypes.cluster_means(features, LABELS, CLUSTERS)
    torch.testing.assert_close(prototypes.cluster_means(features, LABELS.int(), CLUSTERS), expected)


def test_cluster_means_do_not_depend_on_the_order_of_samples():
    """Features and labels may be permuted together."""
    features, order = _randn(7, 3), torch.randperm(7)
    shuffled = prototypes.cluster_means(features[order], LABELS[order], CLUSTERS)
    torch.testing.assert_close(shuffled, prototypes.cluster_means(features, LABELS, CLUSTERS))


def test_gradient_of_cluster_means_is_that_of_finite_differences():
    """autograd's first derivative is right."""
    features = _randn(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: prototypes.cluster_means(f, LABELS, CLUSTERS), features)


def _softmax(row: list[float]) -> list[float]:
    return [math.exp(z) / sum(math.exp(other) for other in row) for z in row]


@pytest.mark.parametrize("temperature", [0.05, None])
def test_prototype_contrast_is_its_definition(temperature):
    """-sum_k q_k ln softmax(scale <row, centroid_k>)_k; q is one at y, or softmax(<c_y, c_k> / t)."""
    rows, centroids, labels, targets = _batch()
    slow = []
    for row, y in zip(rows, labels.tolist(), strict=True):
        p = _softmax([(SCALE * row @ centroid).item() for centroid in centroids])
        q = [float(k == y) for k in range(CLUSTERS)]
        if temperature is not None:
            q = _softmax([(targets[y] @ target).item() / temperature for target in targets])
        slow.append(-sum(a * math.log(b) for a, b in zip(q, p, strict=True)))
    actual = prototypes.prototype_contrast(rows, centroids, labels, targets, SCALE, temperature)
    torch.testing.assert_close(actual, torch.tensor(slow, dtype=torch.float64))


def test_a_cold_target_is_the_label():
    """Where a centre is nearest to itself, the soft target becomes the hard one as its temperature goes to 0."""
    rows, centroids, labels, _ = _batch()
    apart = torch.eye(CLUSTERS, dtype=torch.float64)
    soft = prototypes.prototype_contrast(rows, centroids, labels, apart, SCALE, 1e-3)
    torch.testing.assert_close(soft, prototypes.prototype_contrast(rows, centroids, labels, apart, SCALE, None))


@pytest.mark.parametrize("temperature", [0.05, None])
def test_gradient_is_that_of_finite_differences(temperature):
    """By the rows, the centroids and the scale, which a term may learn."""
    rows, centroids, labels, targets = _batch()

    def loss(rows, centroids, scale):
        return prototypes.prototype_contrast(rows, centroids, labels, targets, scale, temperature)

    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in (rows, centroids, SCALE)])


@pytest.mark.parametrize("temperature", [0.05, None])
def test_a_sample_without_a_cluster_costs_nothing(temperature):
    """Label -1, a sample that came in place of a bad one: zero loss, zero gradient; the others are as before."""
    rows, centroids, labels, targets = _batch()
    rows.requires_grad_()
    expected = prototypes.prototype_contrast(rows, centroids, labels, targets, SCALE, temperature)
    labels[1] = -1
    losses = prototypes.prototype_contrast(rows, centroids, labels, targets, SCALE, temperature)
    losses.sum().backward()
    torch.testing.assert_close(losses, expected * torch.tensor([1, 0, 1, 1]))
    torch.testing.assert_close(rows.grad.abs().sum(dim=1) > 0, torch.tensor([True, False, True, True]))


@pytest.mark.parametrize("temperature", [0.05, None])
def test_clusters_may_be_renumbered(temperature):
    """The number of a cluster carries no meaning."""
    rows, centroids, labels, targets = _batch()
    order = torch.randperm(CLUSTERS)
    renumbered = centroids[order], order.argsort()[labels], targets[order]
    actual = prototypes.prototype_contrast(rows, *renumbered, SCALE, temperature)
    torch.testing.assert_close(
        actual, prototypes.prototype_contrast(rows, centroids, labels, targets, SCALE, temperature)
    )


@pytest.mark.parametrize("temperature", [0.01, None])
def test_large_logits_stay_finite(temperature):
    """The scale may reach 100, and centroids over 0.01 are logits of +-100: numbers in fp32 all the same."""
    rows = torch.tensor([[1.0, 0.0], [0.0, -1.0]]).requires_grad_()
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    scale = torch.tensor(100.0, requires_grad=True)
    losses = prototypes.prototype_contrast(rows, centroids, torch.tensor([1, 2]), centroids, scale, temperature)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(rows.grad).all()
    assert torch.isfinite(scale.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cluster_means_on_a_gpu_repeat_themselves():
    """Bit by bit, also where many rows meet in one cluster."""
    features, labels = torch.randn(200_000, 64, device="cuda"), torch.randint(0, 7, (200_000,), device="cuda")
    first, again = (prototypes.cluster_means(features, labels, 7) for _ in range(2))
    assert torch.equal(first, again)
