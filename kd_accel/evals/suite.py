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

from kd_accel import distributed, processes
from kd_accel.eval_config import EvalConfig
from kd_accel.evals.encoder import load_encoder, load_teacher
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.plan import Plan, make_plan
from kd_accel.evals.results import RESULTS, Row
from kd_accel.evals.table import averages, in_words, table
from kd_accel.evals.watch import watch
from kd_accel.lost import told_in_one_line
from kd_accel.schema import ConfigError

TIMEOUT_S = 3600  # a rank may decode its images this much longer than another
SKIPPED = 3  # exit code when a task had no data


@told_in_one_line(
    waited=f"{TIMEOUT_S} s",
    workers="num_workers",
    smaller="lower batch_size",
    then="the rows that are written stay",
)
def run(config: EvalConfig) -> int:
    """Evaluate `config.model`, or with watch=true all checkpoints of it; returns the exit code.

    Raises ConfigError for what cannot be evaluated; sets that are damaged are told at the end. Raises LocalError when
    another process is lost, or memory is short.
    """
    processes.start_process_group(TIMEOUT_S)
    with distributed.failing_together():  # folders may look different to the machine of another rank
        plan = make_plan(config)

    if distributed.is_main():
        for key, places in plan.skipped.items():
            print(f"skipped {key}: looked for {', '.join(places)}", flush=True)

    def evaluate_model(model: str | Path) -> Iterator[Row]:
        return _evaluate_model(config.model_copy(update={"model": str(model)}), plan)

    if config.watch:
        watch(Path(config.model), evaluate_model, interval_s=config.interval_s, until_step=config.until_step)
    else:
        list(evaluate_model(config.model))
    if plan.skipped and distributed.is_main():
        print(f"without data, and skipped: {', '.join(plan.skipped)}")
    return SKIPPED if plan.skipped else 0


def _evaluate_model(config: EvalConfig, plan: Plan) -> Iterator[Row]:
    """The rows of one model, said as they come, and a table at the end."""
    with distributed.failing_together():  # a watched run may drop a checkpoint while some ranks still read it
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


def _why_not_writable(output: Path) -> str | None:
    """Asked before the first set, not after an hour."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        return f"output: {output} cannot be written ({error.strerror}): name another file with output=FILE"
