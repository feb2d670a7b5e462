"""k-means by scikit-learn and by our own iteration: each on its own, and against each other. E rows, K clusters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kd_accel.models import kmeans as module
from kd_accel.models.kmeans import inertia, kmeans, lloyd

PATHS = [kmeans, lloyd]  # on CPU tensors: scikit-learn, torch
OPTIONS = {"iterations": 20, "restarts": 3, "seed": 0}
K, D = 7, 5


def _blobs(rows: int = 50, spread: float = 0.01) -> tuple[Tensor, Tensor]:
    """(features [E, d], which of K centres each came from); the centres are corners of a cube, 1 apart at least."""
    corners = torch.tensor([[float(k >> bit & 1) for bit in range(D)] for k in range(K)])
    truth = torch.arange(rows * K) % K
    return corners[truth] + spread * torch.randn(rows * K, D), truth


def _means(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == k].mean(dim=0) for k in range(int(labels.max()) + 1)])


@pytest.fixture(params=["whole", "mini-batches", "random start"])
def _way(request, monkeypatch):
    """Each branch that the size of the problem chooses, on a small one."""
    if request.param == "mini-batches":
        monkeypatch.setattr(module, "MOST_EXACT", 1)
    if request.param == "random start":
        monkeypatch.setattr(module, "MOST_SPREAD", 1)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("path", PATHS)
def test_centroids_are_the_means_of_their_members(path):
    """Whatever ended the iteration."""
    features = torch.randn(300, D)
    labels, centroids = path(features, K, **{**OPTIONS, "iterations": 2})
    assert labels.dtype == torch.int64
    torch.testing.assert_close(centroids, _means(features, labels))


@pytest.mark.parametrize("path", PATHS)
def test_well_separated_clusters_are_found(path):
    """Two rows share a label exactly when they come from one centre."""
    features, truth = _blobs()
    labels, _ = path(features, K, **OPTIONS)
    assert torch.equal(labels[:, None] == labels[None], truth[:, None] == truth[None])


@pytest.mark.usefixtures("_way")
def test_both_paths_are_equally_good():
    """Their inertia is within a tenth of each other, on rows that have no clusters and on rows that have."""
    for features in (torch.randn(1000, D), _blobs(spread=0.3)[0]):
        first, second = (inertia(features, *path(features, K, **OPTIONS)) for path in PATHS)
        assert abs(first - second) < 0.1 * first


@pytest.mark.parametrize("path", PATHS)
def test_the_seed_decides(path):
    """The same one gives the same clusters, whatever the global generators say; another one other clusters."""
    features = torch.randn(300, D)
    first = path(features, K, **OPTIONS)
    torch.manual_seed(99)
    again, other = path(features, K, **OPTIONS), path(features, K, **{**OPTIONS, "seed": 1})
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_more_iterations_never_hurt():
    """Lloyd's iteration lowers the inertia step by step."""
    features = torch.randn(500, D)
    values = [inertia(features, *lloyd(features, K, iterations=n, restarts=1, seed=3)) for n in (1, 2, 4, 8, 100)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_the_best_of_several_starts_counts():
    """The first start of three is that of one; the best is no worse."""
    features = torch.randn(300, D)
    options = {"iterations": 3, "seed": 5}
    one, three = (inertia(features, *lloyd(features, K, restarts=n, **options)) for n in (1, 3))
    assert three <= one


def test_a_settled_iteration_stops():
    """Long before it has to; then every row is with its nearest centroid."""
    features = torch.randn(300, D)
    labels, centroids = lloyd(features, K, iterations=10**9, restarts=1, seed=0)
    assert torch.equal(labels, torch.cdist(features, centroids).argmin(dim=1))


def test_distances_may_be_made_in_parts(monkeypatch):
    """Few rows at a time, the same clusters."""
    features = torch.randn(300, D)
    whole = lloyd(features, K, **OPTIONS)
    monkeypatch.setattr(module, "DISTANCES_AT_ONCE", 10 * K)
    torch.testing.assert_close(lloyd(features, K, **OPTIONS), whole)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("path", PATHS)
def test_no_cluster_stays_empty(path):
    """Of 30 rows in 10 places and 10 clusters each place is one, however often a start meets the same place."""
    places = torch.arange(10.0)[:, None] * torch.ones(D)
    labels, centroids = path(places.repeat(3, 1), 10, **{**OPTIONS, "iterations": 50})
    assert labels.bincount(minlength=10).min() > 0
    assert torch.isfinite(centroids).all()


def test_mini_batches_leave_no_cluster_empty(monkeypatch):
    """scikit-learn's do: many clusters, each seen by few rows of a batch."""
    monkeypatch.setattr(module, "MOST_EXACT", 1)
    monkeypatch.setattr(module, "MOST_SPREAD", 1)
    labels, _ = kmeans(torch.randn(3000, D), 1000, iterations=5, restarts=1, seed=0)
    assert labels.bincount(minlength=1000).min() > 0


@pytest.mark.parametrize(
    ("features", "labels", "centroids", "filled"),
    [
        ([0, 0, 1, 5], [0, 0, 0, 0], [0.5, 0.5], [0, 0, 0, 1]),
        ([0, 1, 10], [0, 0, 1], [0, 5, 20], [0, 2, 1]),
        ([3, 3, 3], [0, 0, 0], [3, 3], [0, 0, 0]),
    ],
    ids=["the farthest row", "no cluster's last row", "no row that lies on its centroid"],
)
def test_an_empty_cluster_takes(features, labels, centroids, filled):
    """A row whose own cluster does without it."""
    features, centroids = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (features, centroids))
    labels = torch.tensor(labels)
    module._fill_empty(features, labels, centroids)
    assert labels.tolist() == filled


def test_starts_are_spread():
    """k-means++: one row far from a hundred others is a start, though one in a hundred rows only."""
    features = torch.cat([0.01 * torch.randn(100, D), 50 + torch.randn(1, D)])
    for seed in range(20):
        starts = module._spread_rows(features, 2, torch.Generator().manual_seed(seed))
        assert (starts.norm(dim=1) > 1).sum() == 1


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")  # says just that
@pytest.mark.parametrize("path", PATHS)
def test_fewer_places_than_clusters(path):
    """Rows that are all alike make one cluster; the rest is empty and finite."""
    labels, centroids = path(torch.ones(20, D), 3, **OPTIONS)
    assert len(labels.unique()) == 1
    torch.testing.assert_close(centroids[labels], torch.ones(20, D))
    assert torch.isfinite(centroids).all()


def test_every_row_may_be_its_own_cluster():
    """As many clusters as rows."""
    features = torch.randn(K, D)
    labels, centroids = kmeans(features, K, **OPTIONS)
    torch.testing.assert_close(centroids[labels], features)


def test_fewer_rows_than_clusters_are_refused():
    """The error says what was given and what to change."""
    with pytest.raises(ValueError, match=f"{K - 1} rows cannot make {K} clusters: lower clusters"):
        kmeans(torch.randn(K - 1, D), K, **OPTIONS)


def test_low_precision_rows_are_clustered_in_fp32():
    """bf16 features, as an engine gives them."""
    features, truth = _blobs()
    labels, centroids = kmeans(features.bfloat16(), K, **OPTIONS)
    assert centroids.dtype == torch.float32
    assert torch.equal(labels[:, None] == labels[None], truth[:, None] == truth[None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_repeats_itself():
    """Bit by bit, and as well as scikit-learn."""
    features = torch.randn(20_000, 64)
    first, again = (kmeans(features.cuda(), 100, **OPTIONS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    labels, centroids = (tensor.cpu() for tensor in first)
    torch.testing.assert_close(centroids, _means(features, labels))
    assert inertia(features, labels, centroids) < 1.05 * inertia(features, *kmeans(features, 100, **OPTIONS))
