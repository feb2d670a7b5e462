"""kd-accel demo: the main job, whole and small: teacher, distilled student, baseline, evaluation, release, report.

kd-accel demo                       # about four minutes on two CPU cores, no network
kd-accel demo runs/demo 'seeds=[0,1,2]'
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from kd_accel.demo.digits import write_data
from kd_accel.demo.runs import evaluate, train
from kd_accel.demo.table import row_of, table, verdict
from kd_accel.demo_config import DemoConfig
from kd_accel.models.release_folder import resolve_release
from kd_accel.report.verb import write_report


def run(config: DemoConfig) -> None:
    """Everything of the demo, in order; a second call goes on where the first one stopped.

    Raises ConfigError when a training run fails, with the end of its log.
    """
    started = time.perf_counter()
    folder = Path(config.output_dir)
    _heading(1, "Data: scikit-learn's handwritten digits, captioned")
    write_data(folder / "data")
    _heading(2, "Teacher: a small CLIP, from scratch")
    teacher = train(folder, "demo_teacher.yaml", name="teacher", seed=0)
    students, baselines = [], []
    for seed in config.seeds:
        _heading(3, f"Student: distilled from the teacher, seed {seed}")
        students.append(train(folder, "demo.yaml", f"teacher.path={teacher}", name=f"student_seed{seed}", seed=seed))
        _heading(4, f"Baseline: the same student without the teacher, seed {seed}")
        baselines.append(train(folder, "demo_baseline.yaml", name=f"baseline_seed{seed}", seed=seed))
    _heading(5, "Evaluation: held-out images, zero-shot and retrieval")
    everybody = [teacher, *students, *baselines]
    for path in everybody:
        evaluate(path, folder / "data" / "test")
    _heading(6, "Release and report")
    release = shutil.copytree(resolve_release(str(students[0])), folder / "release", dirs_exist_ok=True)
    report = write_report(everybody, folder / "report.html")
    rows = [row_of("teacher", [teacher]), row_of("student, distilled", students), row_of("student, alone", baselines)]
    print(table(rows))
    print(f"\n{verdict(rows)}\n")
    print(f"release   {release}   open_clip.create_model_and_transforms('local-dir:{release}')")
    print(f"report    {report}")
    print(f"runs      {folder}/{{{','.join(path.name for path in everybody)}}}")
    print(f"took      {time.perf_counter() - started:.0f} s")


def _heading(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)
