"""One model on a list of jobs: rows in results.jsonl, tables and pictures beside it, and nothing done twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kd_accel import distributed
from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.aggregate import write_aggregates
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.examples import write_examples
from kd_accel.evals.features import SetFeatures
from kd_accel.evals.measure import OnSet, measure, measures_of
from kd_accel.evals.plan import Job
from kd_accel.evals.results import Row, append_row, finished, locked, read_results, weights_of, write_tables
from kd_accel.evals.sets import SetError
from kd_accel.schema import ConfigError


def evaluate(
    encoder: Encoder | Ensemble,
    jobs: list[Job],
    config: MeasureConfig,
    *,
    output: Path,
    teacher: Encoder | None = None,
    again: bool = False,
) -> Iterator[tuple[Row, bool]]:
    """(row, whether it is new) of every measure of every job, each as soon as it is done and in `output`. Collective.

    A row that is in `output` already, of the same weights and options, is not measured `again`. Sets that cannot be
    evaluated are passed over, and raise one ConfigError at the end; whatever else goes wrong raises it at once.
    """
    known = {} if again else _known(output, encoder)
    if known:  # whoever wrote the last of them may have been killed before the tables
        distributed.on_main(lambda: _tabulate(output))
    failed = []
    for job in jobs:
        on_set = OnSet(encoder, job, config, teacher=teacher)
        try:
            for what in measures_of(encoder, job):
                row = known.get((job.key, what))
                is_new = row is None or row["options"] != on_set.options(what)
                if is_new:
                    row = measure(on_set, what)
                    distributed.on_main(lambda row=row, on_set=on_set: _record(row, on_set, output))
                yield row, is_new
        except SetError as error:
            failed.append(str(error))
    if failed:
        raise ConfigError("\n".join(failed))


def _known(output: Path, encoder: Encoder | Ensemble) -> dict[tuple[str, str], Row]:
    """What `output` has of this encoder, as rank 0 sees it."""
    rows: list[Row] = []
    distributed.on_main(lambda: rows.extend(read_results(output)))
    about = {"model": encoder.name, "step": encoder.step, "weights": weights_of(encoder)}
    return distributed.from_main(finished(rows, **about))


def _record(row: Row, on_set: OnSet, output: Path) -> None:
    """The row, the tables made of all rows, and pictures of a retrieval set."""
    append_row(output, row)
    _tabulate(output)
    if row["task"] == "retrieval":
        with locked(output):
            write_examples(
                output.parent,
                on_set.job.test,
                on_set.samples,
                SetFeatures(on_set.features.rows, on_set.unit_images),  # the members of an ensemble count alike
                on_set.unit_texts,
                on_set.owner,
                on_set.captions,
                count=on_set.config.examples,
                step=row["step"],
            )


def _tabulate(output: Path) -> None:
    with locked(output):
        write_tables(output)
        write_aggregates(read_results(output), output.parent)
