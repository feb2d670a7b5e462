"""What losses remember: by sample id, in queues, as running means, as clusters. b, B rows, N ids, K places, d width."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kd_accel.memory import FeatureQueue, Prototypes, RunningMean, SampleMemory

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
]
N, K, D = 10, 5, 3


def _prototypes() -> Prototypes:
    return Prototypes(N, K, student_width={"image": D, "text": D + 1}, target_width={"image": D + 2, "text": D})


# By sample id ---------------------------------------------------------------------------------------------------------


def test_a_sample_starts_with_the_columns_value():
    """Until it is written, every id holds its column's first value."""
    memory = SampleMemory(N, {"tau": 0.03, "log_u": -torch.inf})
    read = memory.read(torch.tensor([0, N - 1]))
    torch.testing.assert_close(read, {"tau": torch.full((2,), 0.03), "log_u": torch.full((2,), -torch.inf)})


def test_what_is_written_is_read_by_id():
    """Other ids and other columns stay as they are."""
    memory, ids, values = SampleMemory(N, {"a": 1.0, "b": 2.0}), torch.tensor([7, 0, 3]), torch.randn(3)
    memory.write(ids, {"a": values})
    expected = torch.ones(N).scatter(0, ids, values)
    torch.testing.assert_close(memory.read(torch.arange(N)), {"a": expected, "b": torch.full((N,), 2.0)})


@pytest.mark.parametrize("device", DEVICES)
def test_the_last_of_several_rows_with_one_id_counts(device):
    """A replaced sample can be twice in a batch; a loop that writes row after row says what stays."""
    memory = SampleMemory(N, {"a": 0.0}).to(device)
    ids, values = torch.randint(N, (2000,)), torch.randn(2000)
    slow = torch.zeros(N)
    for i, value in zip(ids.tolist(), values.tolist(), strict=True):
        slow[i] = value
    memory.write(ids.to(device), {"a": values.to(device)})
    torch.testing.assert_close(memory.read(torch.arange(N, device=device))["a"].cpu(), slow)


def test_memory_is_read_as_it_was():
    """A batch that is read, then written, keeps the numbers it has read."""
    memory, ids = SampleMemory(N, {"a": 1.0}), torch.tensor([2, 4])
    before = memory.read(ids)["a"]
    memory.write(ids, {"a": torch.zeros(2)})
    torch.testing.assert_close(before, torch.ones(2))


@pytest.mark.parametrize("outside", [-1, N, N + 7])
def test_an_id_without_a_place_is_named(outside):
    """The error says which id, how many places there are, and what to do."""
    memory = SampleMemory(N, {"a": 0.0})
    memory.read(torch.tensor([0, N - 1]))
    with pytest.raises(ValueError, match=f"sample id {outside} is outside the memory of {N} samples.*kd-accel index"):
        memory.read(torch.tensor([0, outside, N - 1]))


def test_memory_keeps_no_graph():
    """Written values are numbers, not part of a step's graph."""
    memory, values = SampleMemory(N, {"a": 0.0}), torch.randn(2, requires_grad=True)
    memory.write(torch.tensor([1, 2]), {"a": values * 2})
    assert not memory.read(torch.arange(N))["a"].requires_grad


# Queues and means -----------------------------------------------------------------------------------------------------


def test_a_queue_starts_as_unit_rows_of_its_seed():
    """The global generator neither decides them nor is moved by them."""
    state = torch.get_rng_state()
    first, same, other = FeatureQueue(K, D), FeatureQueue(K, D, seed=0), FeatureQueue(K, D, seed=1)
    torch.testing.assert_close(first.features.norm(dim=1), torch.ones(K))
    assert torch.equal(first.features, same.features)
    assert not torch.equal(first.features, other.features)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sizes", [[2, 2, 2, 2], [K, K], [3, K + 4, 1], [2 * K + 1], [1, 0, 2]])
def test_a_queue_holds_the_last_rows(sizes):
    """First in, first out, round and round, whatever the sizes of the batches."""
    queue = FeatureQueue(K, D)
    pushed = list(queue.features.clone())
    for rows in (torch.randn(size, D) for size in sizes):
        queue.push(rows)
        pushed += list(rows)
    oldest_first = queue.features.roll(-int(queue.position), dims=0)
    torch.testing.assert_close(oldest_first, torch.stack(pushed[-K:]))


def test_a_queue_overwrites_the_oldest_place():
    """A ring: what is not replaced stays where it is."""
    queue = FeatureQueue(K, D)
    start, rows = queue.features.clone(), torch.randn(3, D)
    queue.push(rows)
    torch.testing.assert_close(queue.features, torch.cat([rows, start[3:]]))
    queue.push(rows)
    torch.testing.assert_close(queue.features, torch.cat([rows[2:], rows[1:2], rows[2:], rows[:2]]))


def test_a_running_mean_forgets_by_its_momentum():
    """value <- m value + (1 - m) batch mean, from the initial value on."""
    mean, batches = RunningMean(D, initial=1.0, momentum=0.9), torch.randn(4, D)
    slow = [1.0] * D
    for batch in batches:
        mean.set(mean.moved(batch))
        slow = [0.9 * old + 0.1 * new for old, new in zip(slow, batch.tolist(), strict=True)]
    torch.testing.assert_close(mean.value, torch.tensor(slow))


def test_a_running_mean_is_not_moved_by_looking():
    """What it would become is known before it is decided whether the step counts."""
    mean = RunningMean(D, initial=0.0, momentum=0.5)
    mean.moved(torch.ones(D))
    torch.testing.assert_close(mean.value, torch.zeros(D))


# Clusters of an episode -----------------------------------------------------------------------------------------------


def test_before_an_episode_no_sample_has_a_cluster():
    """-1 stands for none."""
    clusters = _prototypes()
    assert clusters.started == -1
    assert {tower: labels.tolist() for tower, labels in clusters.labels_of(torch.arange(N)).items()} == {
        "image": [-1] * N,
        "text": [-1] * N,
    }


def test_an_episode_replaces_the_one_before():
    """Samples of the old one that are not in the new one have no cluster any more; other towers stay."""
    clusters, widths = _prototypes(), (D, D + 2)
    clusters.set("text", ids=torch.arange(N), labels=torch.zeros(N), **_centroids(D + 1, D))
    for ids in ([1, 2, 3], [3, 9]):
        labels, centroids = torch.arange(len(ids)), _centroids(*widths)
        clusters.set("image", ids=torch.tensor(ids), labels=labels, **centroids)
    expected = torch.full((N,), -1).scatter(0, torch.tensor(ids), labels)
    assert torch.equal(clusters.labels_of(torch.arange(N))["image"], expected)
    torch.testing.assert_close(clusters.centroids_of("image"), tuple(centroids.values()))
    assert clusters.labels_of(torch.arange(N))["text"].tolist() == [0] * N
    assert clusters.widths_of("image") == widths


def test_the_last_cluster_of_a_repeated_sample_counts():
    """An episode that reaches into the next epoch can meet a sample twice."""
    clusters = _prototypes()
    clusters.set("image", ids=torch.tensor([4, 4, 5, 4]), labels=torch.tensor([0, 1, 2, 3]), **_centroids(D, D + 2))
    assert clusters.labels_of(torch.tensor([4, 5]))["image"].tolist() == [3, 2]


def _centroids(width: int, target_width: int) -> dict[str, torch.Tensor]:
    return {"centroids": torch.randn(K, width), "target_centroids": torch.randn(K, target_width)}


# All of them ----------------------------------------------------------------------------------------------------------


def _changed() -> dict[str, torch.nn.Module]:
    """One of each, no longer as it was made."""
    memory, queue, mean, clusters = (
        SampleMemory(N, {"a": 0.0}),
        FeatureQueue(K, D),
        RunningMean(D, initial=0, momentum=0.5),
        _prototypes(),
    )
    memory.write(torch.arange(4), {"a": torch.randn(4)})
    queue.push(torch.randn(2, D))
    mean.set(torch.randn(D))
    clusters.set("image", ids=torch.arange(3), labels=torch.arange(3), **_centroids(D, D + 2))
    clusters.started.fill_(12)
    return {"memory": memory, "queue": queue, "mean": mean, "clusters": clusters}


BY_ID = {"memory.a", "clusters.labels.image", "clusters.labels.text"}


def test_all_of_it_is_saved_by_name():
    """state_dict() holds everything but what is by sample id: a fresh one that loads it goes on alike."""
    old, new = torch.nn.ModuleDict(_changed()), torch.nn.ModuleDict(_changed())
    new.load_state_dict(old.state_dict())
    theirs = dict(old.named_buffers())
    assert theirs.keys() - old.state_dict().keys() == BY_ID
    assert all(torch.equal(theirs[name], buffer) for name, buffer in new.named_buffers() if name not in BY_ID)
    rows = torch.randn(4, D)
    for module in (old, new):
        module["queue"].push(rows)
    assert torch.equal(old["queue"].features, new["queue"].features)


def test_all_of_it_moves_and_casts():
    """`.to(dtype)` reaches what are real numbers and leaves counters and labels whole numbers."""
    modules = torch.nn.ModuleDict(_changed()).to(torch.float64)
    whole = {"queue.position", "clusters.started", "clusters.labels.image", "clusters.labels.text"}
    assert {name for name, b in modules.named_buffers() if b.dtype != torch.float64} == whole


# The reference's numbers ----------------------------------------------------------------------------------------------


def _golden_files(root) -> list[dict[str, torch.Tensor]]:
    files = [load_file(path) for path in sorted(root.glob("itra__*.safetensors"))]
    if not files:
        pytest.skip("no golden file of the queues")
    return files


def _calls(golden: dict[str, torch.Tensor], loss: str) -> int:
    """How often the reference was called, one after the other."""
    return sum(key.startswith(f"out.{loss}.call") for key in golden)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    single = expected.dtype == torch.float32  # the golden README's tolerances
    torch.testing.assert_close(
        actual, expected, **({"rtol": 5e-3, "atol": 1e-6} if single else {"rtol": 1e-8, "atol": 1e-10})
    )


@pytest.mark.parametrize(
    ("loss", "whose"), [("compress_1q", "teacher"), ("compress_2q", "teacher"), ("compress_2q", "student")]
)
def test_queues_are_those_of_the_reference(loss, whose, golden_root):
    """Unit rows, in the reference's places after its last call."""
    for golden in _golden_files(golden_root):
        queue = FeatureQueue(*golden[f"in.queue_{whose}"].shape).to(golden["in.teacher"].dtype)
        queue.features.copy_(golden[f"in.queue_{whose}"])
        for k in range(_calls(golden, loss)):
            rows = (
                golden["in.teacher"] * (1 - 0.2 * k) + 0.1 * k
                if whose == "teacher"
                else golden["in.student"] * (1 + 0.1 * k)
            )
            queue.push(F.normalize(rows, dim=1))
        _close(queue.features, golden[f"out.{loss}.queue_{whose}_after"])


@pytest.mark.parametrize(("loss", "state", "initial"), [("dino", "center", 0.0), ("protocpc", "prior", 1.0)])
def test_running_means_are_those_of_the_reference(loss, state, initial, golden_root):
    """DINO's centre follows the teacher's embeddings, ProtoCPC's prior d times its distributions: it sums to d."""
    for golden in _golden_files(golden_root):
        teacher = golden["in.teacher"]
        mean = RunningMean(teacher.shape[1], initial=initial, momentum=0.9).to(teacher.dtype)
        for k in range(_calls(golden, loss)):
            rows = teacher * (1 - 0.2 * k) * 0.1
            said = rows if loss == "dino" else rows.shape[1] * (rows / 0.04).softmax(dim=1)
            mean.set(mean.moved(said.mean(dim=0)))
        _close(mean.value, golden[f"out.{loss}.{state}_after"][0])
