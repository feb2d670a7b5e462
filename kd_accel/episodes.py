"""Episodes of `prototype` terms: from time to time, cluster features of coming samples (ProtoCLIP, arXiv 2206.10996).

An episode is the next `episode_samples` samples of the data order, in whole global batches. The student, or the term's
teacher, looks at them as it is now; rank 0 runs k-means, once per tower; all ranks remember the same clusters until
the episode's samples are used up. Nothing that training draws from or counts is touched, and the step at which an
episode began is saved with the clusters, so a resumed run neither skips one nor repeats one.

Letters: b rows of this rank, B rows of all ranks, E samples of an episode, K clusters, d width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed
from kd_accel.chunks import through_head
from kd_accel.data.loader import TrainLoader
from kd_accel.engine import Engine, concatenated
from kd_accel.losses.prototypes import cluster_means
from kd_accel.memory import Prototypes
from kd_accel.models.kmeans import kmeans
from kd_accel.objective import Objective
from kd_accel.recall import Clusters
from kd_accel.schedules import Progress, value_at
from kd_accel.schema import ConfigError
from kd_accel.terms import Prototype
from kd_accel.types import Batch

log = logging.getLogger("kd_accel")

Source = tuple[str | None, str]  # whose features, None for the student's, and of which tower


class Episodes:
    """What the trainer asks before every step, and what it takes to run an episode.

    terms       the objective's `prototype` terms by name, with their clusters
    steps       by term: global batches per episode
    """

    def __init__(
        self,
        objective: Objective,
        engine: Engine,
        *,
        loader: TrainLoader,
        build_loader: Callable[[], TrainLoader],
        seed: int,
    ):
        """`loader` is the trainer's, of which only the place is read; `build_loader` makes another one like it.

        Raises ConfigError for an episode that is shorter than a global batch or than its clusters are many.
        """
        self.terms = {name: module for name, module in objective.recall.items() if isinstance(module, Clusters)}
        self.steps = {name: _steps(name, module, loader.global_batch) for name, module in self.terms.items()}
        self._engine, self._loader, self._build_loader, self._seed = engine, loader, build_loader, seed

    def prepare(self, progress: Progress) -> None:
        """Run the episodes that are due; collective. Call it before the step's batch is taken from the loader."""
        due = {
            name: module
            for name, module in self.terms.items()
            if episode_is_due(module.term, module.clusters, progress, steps=self.steps[name])
        }
        if not due:
            return
        ahead = self._build_loader()
        ahead.load_state_dict(self._loader.state_dict())
        with closing(iter(ahead)) as batches:
            run_episodes(due, self._engine, batches, progress, steps=self.steps, seed=self._seed)


def episode_is_due(term: Prototype, clusters: Prototypes, progress: Progress, *, steps: int) -> bool:
    """Whether the term counts at this step and its clusters' samples, `steps` global batches, are used up."""
    if value_at(term.weight, progress) <= 0:
        return False
    started = int(clusters.started)
    return started < 0 or progress.step >= started + steps


def run_episodes(
    due: dict[str, Clusters],
    engine: Engine,
    batches: Iterator[list[Batch]],
    progress: Progress,
    *,
    steps: dict[str, int],
    seed: int,
) -> None:
    """Cluster the coming samples anew for the terms `due`, each the first steps[name] of `batches`; collective.

    Terms share one pass over the samples. Those whose features are not finite are in no cluster; raises ConfigError, on
    all ranks, when the others are fewer than the clusters.
    """
    began = time.perf_counter()
    sources = sorted({source for module in due.values() for source in _sources(module.term)}, key=str)
    length = max(steps[name] for name in due)
    ids, features, finite = coming_features(engine, islice(batches, length), sources)
    for name, module in due.items():
        samples = len(ids) // length * steps[name]
        needed = _sources(module.term)
        usable = torch.stack([finite[source][:samples] for source in needed]).all(dim=0)  # [E]
        _check_enough(name, module.term, usable, progress)
        rows = {source: features[source][:samples] for source in needed}
        seed_now = (seed + progress.step) % 2**32
        mine = cluster(module.term, rows, usable, seed=seed_now) if distributed.is_main() else None
        for tower, found in distributed.from_main(mine).items():
            module.clusters.set(tower, ids=ids[:samples].cpu(), **found)
        module.clusters.started.fill_(progress.step)
        if distributed.is_main():
            seconds, left_out = time.perf_counter() - began, samples - int(usable.sum())
            said = f", {left_out} without finite features in none" if left_out else ""
            log.info("%s: %d samples in %d clusters%s, %.1f s", name, samples, module.term.clusters, said, seconds)


@torch.no_grad()
def coming_features(
    engine: Engine, batches: Iterator[list[Batch]], sources: list[Source]
) -> tuple[Tensor, dict[Source, Tensor], dict[Source, Tensor]]:
    """(ids [E], unit features [E, d] by source, whether they are finite [E] by source), in eval mode; collective.

    Of all ranks' rows of `batches`. Rank 0 alone gets the features; the others get [0, d].
    """
    training = engine.module.training
    engine.module.eval()
    ids, parts, finite = [], [], []
    try:
        for micro_batches in batches:
            student, teachers = engine.forward(micro_batches)
            rows = {source: F.normalize(_features(source, student, teachers).float(), dim=1) for source in sources}
            gathered = distributed.gather_rows(rows)
            finite.append({source: torch.isfinite(rows).all(dim=1) for source, rows in gathered.items()})
            mine = torch.cat([batch.ids for batch in micro_batches]).to(engine.accelerator.device)
            ids.append(distributed.gather_rows({"ids": mine})["ids"])
            keep = distributed.is_main()
            parts.append(gathered if keep else {source: rows[:0] for source, rows in gathered.items()})
    finally:
        engine.module.train(training)
    return torch.cat(ids), concatenated(parts), concatenated(finite)


def cluster(
    term: Prototype, features: dict[Source, Tensor], usable: Tensor, *, seed: int
) -> dict[str, dict[str, Tensor]]:
    """By the student's tower: labels [E], centroids [K, d_student], target_centroids [K, d_target], on the CPU.

    The labels are those of the tower it is matched with, and so are the target centroids. Rows that are not `usable`
    [E] get the label -1.
    """
    options = {"iterations": term.iterations, "restarts": term.restarts, "seed": seed}
    targets = {}
    for theirs in sorted(set(term.match.values())):
        rows = features[term.teacher, theirs]
        labels = torch.full((len(rows),), -1, device=rows.device)
        labels[usable], centres = kmeans(rows[usable], term.clusters, **options)
        targets[theirs] = labels, centres
    found = {}
    for ours, theirs in term.match.items():
        labels, centres = targets[theirs]
        means = cluster_means(features[None, ours], labels, term.clusters) if term.back_translation else centres
        found[ours] = {"labels": labels.cpu(), "centroids": means.cpu(), "target_centroids": centres.cpu()}
    return found


def _sources(term: Prototype) -> set[Source]:
    """What an episode of the term looks at: features to cluster, and the student's to back-translate."""
    clustered = {(term.teacher, theirs) for theirs in term.match.values()}
    return clustered | ({(None, ours) for ours in term.match} if term.back_translation else set())


def _features(source: Source, student: dict[str, Tensor], teachers: dict[str, dict[str, Tensor]]) -> Tensor:
    """Raw features of a tower: a teacher's, or what the student's prototype head makes, or the student's own."""
    owner, tower = source
    return teachers[owner][tower] if owner is not None else student[through_head("prototype", tower, student)]


def _check_enough(name: str, term: Prototype, usable: Tensor, progress: Progress) -> None:
    """Raises ConfigError when the rows that can be clustered [E] are fewer than the clusters; alike on every rank."""
    if (count := int(usable.sum())) < term.clusters:
        raise ConfigError(
            f"step {progress.step + 1}: only {count} of the {len(usable)} samples of an episode have finite features,"
            f" too few for objective.terms.{name}.clusters={term.clusters}: lower optim.lr, or look at those samples"
        )


def _steps(name: str, module: Clusters, global_batch: int) -> int:
    """Global batches per episode. Raises ConfigError when that cannot work."""
    term, key = module.term, f"objective.terms.{name}"
    steps = term.episode_samples // global_batch
    if not steps:
        raise ConfigError(
            f"{key}.episode_samples={term.episode_samples} is less than one global batch of {global_batch}: raise it"
        )
    if steps * global_batch < term.clusters:
        raise ConfigError(
            f"{key}.clusters={term.clusters} are more than the {steps * global_batch} samples of an episode (whole"
            f" batches of {global_batch}): lower it, or raise {key}.episode_samples"
        )
    for tower in term.match:
        ours, theirs = module.clusters.widths_of(tower)
        if not term.back_translation and ours != theirs:
            raise ConfigError(
                f"{key}.back_translation=false compares the student's {tower} features ({ours} wide) with cluster"
                f" centres of {theirs}: set it to true, or student.prototype_head.width={theirs}"
            )
    return steps
