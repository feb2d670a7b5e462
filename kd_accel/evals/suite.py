"""kd-accel eval RUN_OR_RELEASE [configs/eval/NAME.yaml] data=FOLDER: tasks and suites, on all processes.

    kd-accel eval runs/demo data=datasets/zeroshot
    kd-accel eval runs/demo configs/eval/datacomp38.yaml data=datasets/datacomp
    torchrun --nproc_per_node 8 -m kd_accel eval runs/demo data=[datasets/zeroshot,datasets/val] batch_size=512

Each task appends its row to results.jsonl as soon as it is done; a second call does only what has no row. A table of
all of them ends the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kd_accel import distributed
from kd_accel.eval_config import EvalConfig, MeasureConfig
from kd_accel.evals.aggregate import write_aggregates
from kd_accel.evals.encoder import Encoder, load_encoder, load_teacher
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.examples import write_examples
from kd_accel.evals.measure import OnSet, measure, measures_of
from kd_accel.evals.plan import Job, Plan, make_plan
from kd_accel.evals.results import RESULTS, Row, append_row, finished, read_results, weights_of, write_tables
from kd_accel.evals.sets import SetError
from kd_accel.evals.table import averages, in_words, table
from kd_accel.evals.watch import watch
from kd_accel.schema import ConfigError

TIMEOUT_S = 3600  # a rank may decode its images this much longer than another
SKIPPED = 3  # exit code when a task had no data


def run(config: EvalConfig) -> int:
    """Evaluate `config.model`, or with watch=true all checkpoints of it; returns the exit code.

    Raises ConfigError for what cannot be evaluated; sets that are damaged are told at the end.
    """
    distributed.start_process_group(TIMEOUT_S)
    plan = make_plan(config)

    def evaluate_model(model: str | Path) -> Iterator[Row]:
        return _evaluate_model(config.model_copy(update={"model": str(model)}), plan)

    if config.watch:
        watch(Path(config.model), evaluate_model, interval_s=config.interval_s, until_step=config.until_step)
    else:
        list(evaluate_model(config.model))
    if distributed.is_main():
        for key, places in plan.skipped.items():
            print(f"skipped {key}: looked for {', '.join(places)}")
    return SKIPPED if plan.skipped else 0


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
    failed = []
    for job in jobs:
        on_set = OnSet(encoder, job, config, teacher=teacher)
        try:
            for what in measures_of(encoder, job):
                row = known.get((job.key, what))
                is_new = row is None or row["options"] != on_set.options(what)
                if is_new:
                    row = measure(on_set, what)
                    distributed.on_main(lambda row=row: append_row(output, row))
                    if what == "retrieval":
                        distributed.on_main(lambda on_set=on_set: _write_examples(output.parent, on_set))
                yield row, is_new
        except SetError as error:
            failed.append(str(error))
    distributed.on_main(lambda: _write_tables(output))
    if failed:
        raise ConfigError("\n".join(failed))


def _evaluate_model(config: EvalConfig, plan: Plan) -> Iterator[Row]:
    """The rows of one model, said as they come, and a table at the end."""
    encoder = load_encoder(
        config.model,
        image_from=config.image_from,
        text_from=config.text_from,
        ensemble=config.ensemble,
        precision=config.precision,
    )
    teacher = load_teacher(config.teacher, student=encoder, precision=config.precision) if config.teacher else None
    output = Path(config.output) if config.output else encoder.home / RESULTS
    if problem := distributed.from_main(_why_not_writable(output) if distributed.is_main() else None):
        raise ConfigError(problem)
    rows = []
    try:
        for row, is_new in evaluate(encoder, plan.jobs, config, output=output, teacher=teacher, again=config.again):
            rows.append(row)
            if distributed.is_main():
                print(in_words(row) + ("" if is_new else "; known already"), flush=True)
            yield row
    finally:
        if distributed.is_main() and rows:
            print(f"\n{encoder.title}\n{table(rows)}\n{averages(rows)}written to {output}", flush=True)


def _known(output: Path, encoder: Encoder | Ensemble) -> dict[tuple[str, str], Row]:
    """What `output` has of this encoder, as rank 0 sees it."""
    rows: list[Row] = []
    distributed.on_main(lambda: rows.extend(read_results(output)))
    about = {"model": encoder.name, "step": encoder.step, "weights": weights_of(encoder)}
    return distributed.from_main(finished(rows, **about))


def _write_examples(folder: Path, on_set: OnSet) -> None:
    write_examples(
        folder,
        on_set.job.test,
        on_set.samples,
        on_set.features,
        on_set.texts,
        on_set.owner,
        on_set.captions,
        count=on_set.config.examples,
        step=on_set.encoder.step,
    )


def _write_tables(output: Path) -> None:
    write_tables(output)
    write_aggregates(read_results(output), output.parent)


def _why_not_writable(output: Path) -> str | None:
    """Asked before the first set, not after an hour."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        return f"output: {output} cannot be written ({error.strerror}): name another file with output=FILE"
