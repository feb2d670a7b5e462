"""k-means against the classes, as scikit-learn scores it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

from kd_accel.evals.clusters import cluster_agreement


def test_classes_that_lie_apart_are_found():
    """In directions: the lengths of the rows, which would pull them apart otherwise, do not count."""
    labels = torch.arange(40) % 4
    images = torch.eye(4, 6)[labels] * torch.logspace(-2, 2, 40)[:, None]
    expected = {"adjusted_rand_index": 1, "adjusted_mutual_info": pytest.approx(1)}
    assert cluster_agreement(images, labels, num_classes=4) == expected


def test_scores_are_scikit_learns_on_digits():
    """With ProtoCLIP's 100 iterations and 5 restarts, as many clusters as classes; twice the same."""
    images, labels = load_digits(return_X_y=True)
    images = F.normalize(torch.from_numpy(images).float(), dim=1)
    clusters = KMeans(10, max_iter=100, n_init=5, random_state=0).fit_predict(images.numpy())
    found = cluster_agreement(images, torch.from_numpy(labels), num_classes=10)
    assert found == {
        "adjusted_rand_index": pytest.approx(adjusted_rand_score(labels, clusters)),
        "adjusted_mutual_info": pytest.approx(adjusted_mutual_info_score(labels, clusters)),
    }
    assert cluster_agreement(images, torch.from_numpy(labels), num_classes=10) == found


def test_fewer_images_than_classes_have_no_clusters():
    found = cluster_agreement(torch.randn(3, 2), torch.arange(3), num_classes=4)
    assert found == {"adjusted_rand_index": None, "adjusted_mutual_info": None}
