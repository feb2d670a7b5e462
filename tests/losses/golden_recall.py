"""Golden files of losses that remember: ITRA's queues, centre and prior; ProtoCLIP's clusters."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from golden_files import Golden
from torch import Tensor

from kd_accel.config import ObjectiveConfig
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import TeacherSpec

PREFIXES = ("itra", "protoclip")
EVERY = slice(None)


def check(path: Path, dtype: torch.dtype, *, chunk_rows: int, rows: slice = EVERY) -> None:
    """Every number that test_golden's parts do not see."""
    golden = Golden(path, dtype)
    if golden.prefix == "protoclip":
        _check_prototypes(golden, chunk_rows, rows)
        return
    for name, term in _terms(golden.hyper).items():
        _check_calls(golden, name, term, chunk_rows, rows)


# ITRA -----------------------------------------------------------------------------------------------------------------


def _terms(hyper: dict) -> dict[str, dict]:
    queue = {"queue_size": hyper["queue_size"]}
    compress = {"kind": "compress", "temperature": hyper["compress_T"], **queue}
    sharp = {"teacher_temperature": hyper["dino_teacher_temp"], "student_temperature": hyper["dino_student_temp"]}
    seed = {"temperature": hyper["seed_t"], "teacher_temperature": hyper["seed_teacher_temp"], **queue}
    return {
        "compress_1q": compress,
        "compress_2q": {**compress, "queues": "2q"},
        "seed": {"kind": "seed", **seed},
        "dino": {"kind": "dino", "momentum": hyper["center_momentum"], **sharp},
        "protocpc": {"kind": "proto_cpc", "momentum": hyper["center_momentum"], **sharp},
    }


def _check_calls(golden: Golden, name: str, term: dict, chunk_rows: int, rows: slice) -> None:
    """Losses and gradients call after call, and what is left at the end."""
    objective = _objective({name: {**term, "match": {"image": "image"}}}, golden, chunk_rows)
    for key, queue in getattr(objective.recall[name], "queues", {}).items():
        queue.features.copy_(golden[f"in.queue_{key.removesuffix('_image')}"])
    for k in range(sum(bool(re.fullmatch(rf"out\.{name}\.call\d+", key)) for key in golden.tensors)):
        student, teacher = golden["in.student"] * (1 + 0.1 * k), golden["in.teacher"] * (1 - 0.2 * k)
        teacher = teacher * 0.1 if name in ("dino", "protocpc") else teacher + 0.1 * k
        given = {"image": student[rows]}, {"teacher": {"image": teacher[rows]}}
        outcome = objective(*given, Progress(step=k))
        golden.assert_close(outcome.loss, golden[f"out.{name}.call{k}"], f"out.{name}.call{k}")
        expected = golden[f"grad.{name}.call{k}.student"][rows]
        golden.assert_close(outcome.gradients["image"], expected, f"grad.{name}.call{k}.student")
        objective.step(Progress(step=k), lr=0.0, temperature_lr=0.0)
    for key in [key for key in golden.tensors if re.fullmatch(rf"out\.{name}\.\w+_after", key)]:
        what = key.removeprefix(f"out.{name}.").removesuffix("_after")
        golden.assert_close(_left(objective.recall[name], what), golden[key], key)
    unseen = {key for key in golden.tensors if re.match(rf"(out|grad)\.{name}\.", key)} - golden.checked
    assert not unseen, unseen


def _left(recall: torch.nn.Module, what: str) -> Tensor:
    """A queue, or a running mean as a row."""
    if what.startswith("queue_"):
        return recall.queues[f"{what.removeprefix('queue_')}_image"].features
    return recall.means["image"].value[None]


def _objective(terms: dict[str, dict], golden: Golden, chunk_rows: int) -> Objective:
    width = golden["in.student"].shape[1]
    config = validate(ObjectiveConfig, {"terms": terms, "chunk_rows": chunk_rows})
    teachers = {"teacher": TeacherSpec(golden["in.teacher"].shape[1], 1.0)}
    return Objective(config, teachers=teachers, widths={"image": width}).to(golden.dtype)


# ProtoCLIP ------------------------------------------------------------------------------------------------------------

SOURCES = {"image": "text", "text": "image"}  # whose clusters a tower learns
SHORT = {"image": "img", "text": "text"}


def _check_prototypes(golden: Golden, chunk_rows: int, rows: slice) -> None:
    hyper = golden.hyper
    own = {"kind": "prototype", "clusters": hyper["k"], "weight": hyper["w_proto"]}
    softened = hyper["target_temperature"] if hyper["target_temperature"] > 0 else None
    own["target_temperature"] = softened
    without = {**own, "back_translation": False, "weight": 1.0}
    external = {"kind": "prototype", "clusters": hyper["k_external"], "weight": hyper["w_proto_external"]}
    external |= {"teacher": "external", "match": {"image": "text", "text": "text"}, "target_temperature": None}
    terms = {"proto": own} | ({"proto_external": external} if hyper["w_proto_external"] else {})

    total = _run_prototypes(golden, terms, chunk_rows, rows)
    golden.assert_close(total.loss, golden["out.total"], "out.total")
    for name in terms:
        golden.assert_close(total.metrics[f"loss/{name}"], golden[f"out.{name}"], f"out.{name}")
    _check_gradients(golden, total, "grad.total", rows)
    alone = _run_prototypes(golden, {"proto": without}, chunk_rows, rows)
    golden.assert_close(alone.loss, golden["out.proto_without_pbt"], "out.proto_without_pbt")
    _check_gradients(golden, alone, "grad.proto_without_pbt", rows)
    for tower, source in SOURCES.items():
        one = _run_prototypes(golden, {"proto": {**own, "weight": 1.0, "match": {tower: source}}}, chunk_rows, rows)
        key = f"out.{SHORT[tower]}2{SHORT[source]}"
        golden.assert_close(one.loss, golden[key], key)
        if f"out.{SHORT[tower]}2external" in golden:
            one = {**external, "weight": 1.0, "match": {tower: "text"}}
            key = f"out.{SHORT[tower]}2external"
            golden.assert_close(_run_prototypes(golden, {"proto": one}, chunk_rows, rows).loss, golden[key], key)
    left = {key for key in golden.tensors.keys() - golden.checked if not key.startswith(("in.", "out.acc_"))}
    assert {key for key in left if "ext" not in key or "proto_external" in terms} == set()


def _run_prototypes(golden: Golden, terms: dict[str, dict], chunk_rows: int, rows: slice):
    """The Outcome of one batch of the episode, with the gradient of the one scale that all terms share there."""
    from kd_accel.losses.prototypes import cluster_means

    features = {f"prototype_{tower}": golden[f"in.{tower}_projected"] for tower in SOURCES}
    widths = {name: f.shape[1] for name, f in features.items()} | {tower: 1 for tower in SOURCES}
    specs = {"external": TeacherSpec(golden["in.episode.external"].shape[1], 1.0)}
    episode = len(golden["in.episode.image"])
    config = validate(ObjectiveConfig, {"terms": terms, "chunk_rows": chunk_rows})
    objective = Objective(config, teachers=specs, widths=widths, num_ids=episode).to(golden.dtype)
    for name, term in config.terms.items():
        with torch.no_grad():
            objective.own_log_scale[name].copy_(golden["in.log_scale_proto"])
        for tower, source in term.match.items():
            owner = "external" if term.teacher else source
            labels, targets = golden[f"in.episode.labels_{owner}"], golden[f"in.centroids_{owner}"]
            centroids = targets
            if term.back_translation:
                centroids = cluster_means(golden[f"in.episode.{tower}"], labels, term.clusters)
                key = f"out.pbt.{SHORT[tower]}_from_{SHORT.get(owner, 'ext')}"
                golden.assert_close(centroids, golden[key], key)
            given = {"ids": torch.arange(episode), "labels": labels}
            objective.recall[name].clusters.set(tower, **given, centroids=centroids, target_centroids=targets)
    student = {name: f[rows] for name, f in features.items()} | {
        t: torch.ones(len(f[rows]), 1) for t, f in _towers(features)
    }
    external = golden["in.episode.external"][golden["in.idx"]][rows]
    teachers = {"external": {"image": external, "text": external}}
    outcome = objective(student, teachers, Progress(), ids=golden["in.idx"][rows])
    outcome.metrics["d log_scale_proto"] = sum(own.grad for own in objective.own_log_scale.values())
    return outcome


def _towers(features: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix("prototype_"), rows) for name, rows in features.items()]


def _check_gradients(golden: Golden, outcome, start: str, rows: slice) -> None:
    """By unit features there, by raw ones here: without the part along them."""
    for name, expected in golden.gradients(start).items():
        if name == "log_scale_proto":
            golden.assert_close(outcome.metrics["d log_scale_proto"], expected, f"{start}.{name}")
            continue
        unit = golden[f"in.{name}"]
        expected = expected - (expected * unit).sum(1, keepdim=True) * unit
        actual = outcome.gradients[f"prototype_{name.removesuffix('_projected')}"]
        golden.assert_close(actual, expected[rows], f"{start}.{name}")
