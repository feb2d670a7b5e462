"""Episodes: when they are due, which samples they are of, whose clusters they give, and that nothing else notices.

E samples of an episode, K clusters.
"""

from __future__ import annotations

from itertools import islice

import episode_run
import every_term
import pytest
import torch
import torch.nn.functional as F
from episode_run import EPISODE, GLOBAL_BATCH, STEPS_PER_EPOCH, Pieces, build, config_of
from safetensors.torch import load_file
from torch import Tensor

from kd_accel import episodes
from kd_accel.config import TrainConfig
from kd_accel.data.index import expand_shards
from kd_accel.data.order import epoch_order
from kd_accel.data.shards import TarSource
from kd_accel.launch import end_accelerator
from kd_accel.losses.prototypes import cluster_means
from kd_accel.memory import Prototypes
from kd_accel.models.kmeans import kmeans
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError, validate
from kd_accel.terms import Prototype

HEAD = {"hidden": 10, "width": 5}


@pytest.fixture
def make(train_shards, tiny_teacher):
    """A function that builds the pieces of a run with these terms; keywords are the student's."""

    def make(terms: dict | None = None, **student) -> Pieces:
        return build(config_of(train_shards, tiny_teacher, terms or {"prototype": EPISODE}, **student))

    yield make
    end_accelerator()


def coming(pieces: Pieces, steps: int) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """(ids [E], unit features [E, d] by model and tower) of the trainer's next batches, which this takes."""
    batches = list(islice(iter(pieces.loader), steps))
    pieces.engine.module.eval()
    with torch.no_grad():
        said = [pieces.engine.forward(batch) for batch in batches]
    pieces.engine.module.train()
    found = {}
    for tower in ("image", "text"):
        found["student", tower] = torch.cat([student.get(f"prototype_{tower}", student[tower]) for student, _ in said])
        found["teacher", tower] = torch.cat([teachers["teacher"][tower] for _, teachers in said])
    ids = torch.cat([batch.ids for micro_batches in batches for batch in micro_batches])
    return ids, {key: F.normalize(rows.float(), dim=1) for key, rows in found.items()}


def assert_clusters(pieces: Pieces, tower: str, expected: dict, term: str = "prototype") -> None:
    """`expected`: ids and labels [E], centroids and target_centroids [K, d]."""
    assert torch.equal(pieces.labels(tower, term)[expected["ids"]], expected["labels"])
    assert (pieces.labels(tower, term) >= 0).sum() == len(expected["ids"].unique())
    centroids = expected["centroids"], expected["target_centroids"]
    torch.testing.assert_close(pieces.clusters(term).centroids_of(tower), centroids)


# When -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "step", "due"),
    [(-1, 0, True), (-1, 7, True), (4, 4, False), (4, 6, False), (4, 7, True), (4, 99, True)],
)
def test_an_episode_is_due_when_its_samples_are_used_up(started, step, due):
    """Of 3 global batches; asking changes nothing."""
    clusters = Prototypes(9, 3, student_width={"image": 2}, target_width={"image": 2})
    clusters.started.fill_(started)
    for _ in range(2):
        assert episodes.episode_is_due(Prototype(), clusters, Progress(step), steps=3) == due


def test_no_episode_while_the_term_does_not_count():
    """Weight zero in the first epoch, as in ProtoCLIP: the first episode comes with the second one."""
    clusters = Prototypes(9, 3, student_width={"image": 2}, target_width={"image": 2})
    term = Prototype(weight={"kind": "piecewise", "values": [0, 1], "epochs": [1]})
    due = [episodes.episode_is_due(term, clusters, Progress(step, step / 2), steps=3) for step in range(4)]
    assert due == [False, False, True, True]


def test_episodes_follow_each_other(make):
    """Every second step begins one, and the step's own batch is in it, also across the end of an epoch."""
    pieces = make()
    began = []
    for ids in (pieces.train(1)[0] for _ in range(2 * STEPS_PER_EPOCH)):
        began.append(int(pieces.clusters().started))
        assert (pieces.labels("image")[ids] >= 0).all()
        assert (pieces.labels("image") >= 0).sum() <= 2 * GLOBAL_BATCH
    assert began == [step // 2 * 2 for step in range(2 * STEPS_PER_EPOCH)]


def test_a_resumed_objective_neither_skips_nor_repeats(make):
    """In the middle of an episode it has the clusters and waits; at the end of it the next one is due."""
    pieces = make()
    pieces.train(1)
    state = every_term.state(pieces.objective)
    resumed = make()
    every_term.load_state(resumed.objective, state)
    term = resumed.objective.config.terms["prototype"]
    due = [episodes.episode_is_due(term, resumed.clusters(), Progress(step), steps=2) for step in (1, 2)]
    assert due == [False, True]
    for tower in ("image", "text"):
        assert torch.equal(resumed.labels(tower), pieces.labels(tower))
        torch.testing.assert_close(resumed.clusters().centroids_of(tower), pieces.clusters().centroids_of(tower))


# What -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back_translation", [True, False])
@pytest.mark.parametrize("student", [{}, {"prototype_head": HEAD}], ids=["unit features", "prototype head"])
def test_clusters_are_those_of_the_other_tower(make, student, back_translation):
    """Labels and targets come from the matched tower; centroids from the student's own features, or from it as well."""
    pieces = make({"prototype": {**EPISODE, "back_translation": back_translation}}, **student)
    pieces.episodes.prepare(pieces.progress())
    ids, features = coming(pieces, 2)
    options = {"iterations": 20, "restarts": 3, "seed": 0}
    for ours, theirs in (("image", "text"), ("text", "image")):
        labels, centres = kmeans(features["student", theirs], 3, **options)
        means = cluster_means(features["student", ours], labels, 3) if back_translation else centres
        expected = {"ids": ids, "labels": labels, "centroids": means, "target_centroids": centres}
        assert_clusters(pieces, ours, expected)


def test_clusters_of_a_teacher(make):
    """A term that names a teacher clusters that one's features; the student's, of another width, are averaged."""
    pieces = make({"prototype": {**EPISODE, "teacher": "teacher", "match": {"image": "text"}}})
    pieces.episodes.prepare(pieces.progress())
    ids, features = coming(pieces, 2)
    labels, centres = kmeans(features["teacher", "text"], 3, iterations=20, restarts=3, seed=0)
    means = cluster_means(features["student", "image"], labels, 3)
    assert_clusters(pieces, "image", {"ids": ids, "labels": labels, "centroids": means, "target_centroids": centres})


def test_terms_of_different_length_share_the_pass(make):
    """Each takes its own part of it from the front."""
    terms = {"prototype": EPISODE, "short": {**EPISODE, "episode_samples": GLOBAL_BATCH}}
    pieces = make(terms)
    pieces.episodes.prepare(pieces.progress())
    ids, _ = coming(pieces, 2)
    for term, count in (("prototype", 2 * GLOBAL_BATCH), ("short", GLOBAL_BATCH)):
        assert (pieces.labels("text", term) >= 0).nonzero()[:, 0].tolist() == sorted(ids[:count].tolist())


def test_the_next_episode_looks_with_the_present_weights(make):
    """Features are those of the step at which the episode begins."""
    pieces = make()
    pieces.train(2)
    with torch.no_grad():
        for parameter in pieces.engine.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pieces.episodes.prepare(pieces.progress())
    ids, features = coming(pieces, 2)
    labels, centres = kmeans(features["student", "text"], 3, iterations=20, restarts=3, seed=2)
    means = cluster_means(features["student", "image"], labels, 3)
    assert_clusters(pieces, "image", {"ids": ids, "labels": labels, "centroids": means, "target_centroids": centres})


def test_says_what_it_did(make, caplog):
    """One line per term: samples, clusters, seconds."""
    pieces = make()
    with caplog.at_level("INFO", "kd_accel"):
        pieces.episodes.prepare(pieces.progress())
    (line,) = [record.getMessage() for record in caplog.records if record.module == "episodes"]
    assert line.startswith(f"prototype: {2 * GLOBAL_BATCH} samples in 3 clusters, ")


# That nothing else notices --------------------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_happened(make):
    """The trainer's loader, the random numbers, the engine's mode: an episode leaves them as they were."""
    pieces = make()
    before, random = pieces.loader.state_dict(), torch.get_rng_state()
    pieces.episodes.prepare(pieces.progress())
    assert pieces.loader.state_dict() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert pieces.engine.module.training
    assert not any(parameter.grad is not None for parameter in pieces.engine.student.parameters())


def test_a_run_without_prototypes_never_looks_ahead(make):
    """No term, no loader."""
    pieces = make({"clip": {"kind": "clip"}})
    pieces.episodes._build_loader = None
    pieces.episodes.prepare(pieces.progress())


# What cannot work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"episode_samples": GLOBAL_BATCH - 1}, r"episode_samples=7 is less than one global batch of 8"),
        ({"clusters": 17}, r"clusters=17 are more than the 16 samples of an episode"),
        (
            {"teacher": "teacher", "back_translation": False},
            r"back_translation=false compares the student's image features \(8 wide\) with cluster centres of 12",
        ),
    ],
)
def test_an_episode_that_cannot_work_is_refused(make, values, complaint):
    """Before the first step, naming the term's key."""
    with pytest.raises(ConfigError, match=rf"objective\.terms\.prototype\.{complaint}"):
        make({"prototype": EPISODE | values})


def break_rows(pieces: Pieces, monkeypatch, rows: slice, model: str = "student", tower: str = "image") -> None:
    """From here on the engine says nan in some rows of every batch."""
    forward = pieces.engine.forward

    def broken(batches):
        student, teachers = forward(batches)
        features = student if model == "student" else teachers[model]
        features[tower] = features[tower].clone()
        features[tower][rows, 0] = torch.nan
        return student, teachers

    monkeypatch.setattr(pieces.engine, "forward", broken)


@pytest.mark.parametrize("back_translation", [True, False])
def test_features_that_are_not_numbers_are_in_no_cluster(make, monkeypatch, caplog, back_translation):
    """The other samples are clustered as if those had not been there, for both towers, and the log counts them."""
    pieces = make({"prototype": {**EPISODE, "back_translation": back_translation}})
    break_rows(pieces, monkeypatch, slice(2, 3))
    with caplog.at_level("INFO", "kd_accel"):
        pieces.episodes.prepare(pieces.progress())
    (line,) = [record.getMessage() for record in caplog.records if record.module == "episodes"]
    assert line.startswith("prototype: 16 samples in 3 clusters, 2 without finite features in none, ")
    ids, features = coming(pieces, 2)
    usable = torch.arange(2 * GLOBAL_BATCH) % GLOBAL_BATCH != 2
    for ours, theirs in (("image", "text"), ("text", "image")):
        assert (pieces.labels(ours)[ids[~usable]] == -1).all()
        labels, centres = kmeans(features["student", theirs][usable], 3, iterations=20, restarts=3, seed=0)
        means = cluster_means(features["student", ours][usable], labels, 3) if back_translation else centres
        expected = {"ids": ids[usable], "labels": labels, "centroids": means, "target_centroids": centres}
        assert_clusters(pieces, ours, expected)


def test_a_tower_that_the_term_does_not_look_at(make, monkeypatch):
    """Whether its features are finite does not matter."""
    pieces = make({"prototype": {**EPISODE, "teacher": "teacher", "match": {"image": "text"}}})
    break_rows(pieces, monkeypatch, slice(None), "teacher", "image")
    pieces.episodes.prepare(pieces.progress())
    assert (pieces.labels("image") >= 0).sum() == 2 * GLOBAL_BATCH


def test_too_few_features_that_are_numbers_stop_the_run(make, monkeypatch):
    """One line: the step, how many, and the key; the clusters stay as they were, and so does the engine's mode."""
    pieces = make()
    break_rows(pieces, monkeypatch, slice(1, None))
    expected = r"^step 1: only 2 of the 16 samples .* objective\.terms\.prototype\.clusters=3: lower"
    with pytest.raises(ConfigError, match=expected):
        pieces.episodes.prepare(pieces.progress())
    assert pieces.clusters().started == -1
    assert pieces.engine.module.training


def test_a_pass_that_breaks_off_leaves_the_engine_in_training_mode(make, monkeypatch):
    """Whatever the reason."""
    pieces = make()
    monkeypatch.setattr(episodes.distributed, "gather_rows", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pieces.episodes.prepare(pieces.progress())
    assert pieces.engine.module.training


# Ranks, and whole runs ------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_ranks_are_one_rank(make, run_ranks, tmp_path, train_shards, tiny_teacher):
    """Two ranks with half the rows each remember what one rank remembers, and both the same."""
    one = make()
    one.train(3)
    run_ranks([episode_run.__file__, str(tmp_path), str(train_shards), str(tiny_teacher)])
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, tensor in one.clusters().state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], tensor)


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, train_shards, tiny_teacher):
    """kd-accel train, stopped between two episodes and inside one: the same weights and clusters in the end."""
    from kd_accel.train import run

    values = config_of(train_shards, tiny_teacher, {"clip": {"kind": "clip"}, "prototype": EPISODE}).model_dump()
    values |= {"output_dir": str(tmp_path), "save": {"every_steps": 1, "keep_last": 9}}
    values["optim"] |= {"steps": 5}
    run(validate(TrainConfig, values | {"name": "whole"}))
    for step in (2, 3):
        resume = tmp_path / f"whole/checkpoints/step_{step:08d}"
        run(validate(TrainConfig, values | {"name": f"from_{step}", "resume": str(resume)}))
        for file in ("objective", "weights"):
            ends = [f"{name}/checkpoints/step_00000005/state/{file}.safetensors" for name in ("whole", f"from_{step}")]
            whole, resumed = (load_file(tmp_path / end) for end in ends)
            assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert whole.keys() == resumed.keys()


def test_a_run_trains_on_the_samples_it_has_clustered(tmp_path, train_shards, tiny_teacher):
    """kd-accel train, at the end of an episode: the samples with a cluster are those it was trained on."""
    from kd_accel.train import run

    values = config_of(train_shards, tiny_teacher, {"prototype": EPISODE}).model_dump()
    config = validate(TrainConfig, values | {"output_dir": str(tmp_path), "optim": values["optim"] | {"steps": 2}})
    run(config)
    state = load_file(tmp_path / "episodes/checkpoints/step_00000002/state/memory_00000_of_00001.safetensors")
    options = {"seed": config.seed, "window": config.data.shuffle_window, "global_batch": GLOBAL_BATCH}
    trained = epoch_order(TarSource(expand_shards(str(train_shards))).shard_sizes, epoch=0, **options)
    for tower in ("image", "text"):
        clustered = (state[f"recall.prototype.clusters.labels.{tower}"] >= 0).nonzero()[:, 0]
        assert clustered.tolist() == sorted(trained[:2].flatten().tolist())
