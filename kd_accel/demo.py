"""kd-accel demo: the main job, whole and small: teacher, distilled student, baseline, evaluation, release, report.

    kd-accel demo                       # about four minutes on two CPU cores, no network
    kd-accel demo runs/demo 'seeds=[0,1,2]'

The images are scikit-learn's 1,797 handwritten digits, each printed in one of four inks on one of four papers: without
colours all images of a digit would share a caption, and recall counts only an image's own. Retrieval is measured on 160
held-out images, one for each combination of digit, ink and paper; top-1 on all 360 held-out images.
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kd_accel.config import DemoConfig
from kd_accel.data.index import build_index, expand_shards
from kd_accel.eval_config import EvalConfig
from kd_accel.evals import suite
from kd_accel.models.release import resolve_release
from kd_accel.report.runs import count_parameters
from kd_accel.report.verb import write_report
from kd_accel.schema import ConfigError
from kd_accel.text_files import read_rows

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"white": "#ffffff", "yellow": "#ffe13c", "pink": "#ff96be", "cyan": "#50e1eb"}
PAPERS = {"black": "#0a0a0a", "blue": "#1928a0", "green": "#0a5a28", "red": "#8c1419"}
TEMPLATES = (
    "a photo of the digit {digit} in {ink} on {paper}",
    "the handwritten number {digit}, {ink} ink on {paper} paper",
    "{ink} {digit} on a {paper} background",
    "somebody wrote a {digit} with a {ink} pen on {paper} paper",
    "a {paper} card with a {ink} {digit}",
)
IMAGE_SIZE = 32  # pixels; the scans have 8 x 8
TEST_PER_CLASS = 36  # 360 of 1,797
NUM_SHARDS = 6
TAIL = 20  # lines of a failed run that are shown

Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}


def run(config: DemoConfig) -> None:
    """Everything of the demo, in order; a second call goes on where the first one stopped.

    Raises ConfigError when a training run fails, with the end of its log.
    """
    started = time.perf_counter()
    folder = Path(config.output_dir)
    _heading(1, "Data: scikit-learn's handwritten digits, captioned")
    write_data(folder / "data")
    _heading(2, "Teacher: a small CLIP, from scratch")
    teacher = _train(folder, "demo_teacher.yaml", name="teacher", seed=0)
    students, baselines = [], []
    for seed in config.seeds:
        _heading(3, f"Student: distilled from the teacher, seed {seed}")
        students.append(_train(folder, "demo.yaml", f"teacher.path={teacher}", name=f"student_seed{seed}", seed=seed))
        _heading(4, f"Baseline: the same student without the teacher, seed {seed}")
        baselines.append(_train(folder, "demo_baseline.yaml", name=f"baseline_seed{seed}", seed=seed))
    _heading(5, "Evaluation: held-out images, zero-shot and retrieval")
    everybody = [teacher, *students, *baselines]
    for path in everybody:
        _evaluate(path, folder / "data" / "test")
    _heading(6, "Release and report")
    release = shutil.copytree(resolve_release(str(students[0])), folder / "release", dirs_exist_ok=True)
    report = write_report(everybody, folder / "report.html")
    rows = [_row("teacher", [teacher]), _row("student, distilled", students), _row("student, alone", baselines)]
    print(table(rows))
    print(f"\n{_verdict(rows)}\n")
    print(f"release   {release}   open_clip.create_model_and_transforms('local-dir:{release}')")
    print(f"report    {report}")
    print(f"runs      {folder}/{{{','.join(path.name for path in everybody)}}}")
    print(f"took      {time.perf_counter() - started:.0f} s")


def _heading(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)


# Data ---------------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Indexed training shards in folder/train; the held-out images in CLIP_benchmark's layouts in folder/test."""
    if (folder / "train" / "manifest.json").exists():  # the index is written last
        print(f"found in {folder}")
        return
    train, test = load_digits()
    samples = [(f"{i:06d}", _image(*row) | {"txt": _caption(i, row)}) for i, row in enumerate(train)]
    for number in range(NUM_SHARDS):
        _write_tar(folder / "train" / f"{number:05d}.tar", samples[number::NUM_SHARDS])
    _write_zero_shot(folder / "test" / "digits", test)
    _write_retrieval(folder / "test" / "digits_retrieval", test)
    build_index(expand_shards(str(folder / "train")))
    print(f"{len(train):,} images in {NUM_SHARDS} shards to train on, {len(test)} held out: {folder}")


def load_digits() -> tuple[list, list]:
    """(training rows, held-out rows) of (pixels [8, 8] in 0..1, digit, ink name, paper name).

    The split is stratified and fixed. Colours take turns, so each digit has every combination within any 16 rows.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ConfigError("demo needs scikit-learn for its images: pip install scikit-learn") from None
    digits = load()
    colors = [(ink, paper) for ink in INKS for paper in PAPERS]
    train, test = [], []
    for i in np.random.default_rng(0).permutation(len(digits.target)):
        digit = int(digits.target[i])
        seen = sum(row[1] == digit for row in [*train, *test])
        ink, paper = colors[seen % len(colors)]
        (test if seen < TEST_PER_CLASS else train).append((digits.images[i] / 16, digit, ink, paper))
    return train, test


def _image(pixels: np.ndarray, digit: int, ink: str, paper: str) -> dict[str, bytes]:
    """The digit in its colours, as a PNG of IMAGE_SIZE."""
    gray = Image.fromarray((pixels * 255).astype(np.uint8)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    ImageOps.colorize(gray, black=PAPERS[paper], white=INKS[ink]).save(file, format="PNG")
    return {"png": file.getvalue()}


def _caption(number: int, row: tuple) -> bytes:
    """Templates take turns."""
    _, digit, ink, paper = row
    return TEMPLATES[number % len(TEMPLATES)].format(digit=DIGITS[digit], ink=ink, paper=paper).encode()


def _write_zero_shot(folder: Path, rows: list) -> None:
    """Ten classes; the templates name every ink and every paper once, so that their mean is about the digit alone."""
    samples = [(f"{i:06d}", _image(*row) | {"cls": str(row[1]).encode()}) for i, row in enumerate(rows)]
    _write_benchmark(folder, "classification", samples)
    colors = enumerate(zip(INKS, PAPERS, strict=True))
    lines = [TEMPLATES[i % len(TEMPLATES)].format(digit="{c}", ink=ink, paper=paper) for i, (ink, paper) in colors]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(lines) + "\n")
    (folder / "classnames.txt").write_text("\n".join(DIGITS) + "\n")


def _write_retrieval(folder: Path, rows: list) -> None:
    """The first image of each combination of digit, ink and paper, with its caption: no two captions are alike."""
    first = {row[1:]: row for row in reversed(rows)}.values()
    samples = [(f"{i:06d}", _image(*row) | {"txt": _caption(0, row)}) for i, row in enumerate(first)]
    _write_benchmark(folder, "retrieval", samples)


def _write_benchmark(folder: Path, kind: str, samples: list[Sample]) -> None:
    _write_tar(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")


def _write_tar(path: Path, samples: list[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # no times, no owners: the same bytes everywhere
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# Runs ---------------------------------------------------------------------------------------------------------------


def _train(folder: Path, config: str, *overrides: str, name: str, seed: int) -> Path:
    """Launch two processes with ZeRO-2 on the CPU; returns the run directory. A finished run ends at once."""
    values = [f"data.shards={folder / 'data' / 'train'}", f"output_dir={folder}", f"name={name}", f"seed={seed}"]
    train = ["train", str(_shipped("configs", config)), *values, *overrides, "resume=auto"]
    launch = ["--config_file", str(_shipped("launch", "zero2.yaml")), "--num_processes=2", "--main_process_port=0"]
    print(f"$ accelerate launch {' '.join(launch)} -m kd_accel {' '.join(train)}", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "kd_accel", *train]
    _launch(command, log=folder / "logs" / f"{name}.log")
    return folder / name


def _shipped(*parts: str) -> Path:
    """A file of the checkout that kd_accel runs from."""
    path = Path(__file__).resolve().parents[1].joinpath(*parts)
    if not path.exists():
        raise ConfigError(f"demo needs {'/'.join(parts)} of the repository: run it from a checkout (pip install -e .)")
    return path


def _launch(command: list[str], *, log: Path) -> None:
    """Run `command` with everything it prints in `log`; our own lines are shown. Raises ConfigError when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    root = str(Path(__file__).resolve().parents[1])
    # Two processes on two cores: one thread each, or they fight. GPUs are hidden: the demo's numbers are for the CPU.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with log.open("w", encoding="utf-8") as file, subprocess.Popen(command, env=environment, **output) as process:
        for line in process.stdout:
            file.write(line)
            if " | INFO | " in line or " | WARNING | " in line:
                print(f"  {line.rstrip()}", flush=True)
    if process.returncode:
        said = "\n".join(_last_words(log.read_text(encoding="utf-8", errors="replace").splitlines()))
        raise ConfigError(f"{said}\ndemo: a run failed (exit code {process.returncode}); all that it said is in {log}")


def _last_words(lines: list[str]) -> list[str]:
    """What went wrong: our own error lines, else the end of what came before the launcher's summary of exit codes."""
    said = list(takewhile(lambda line: "torch/distributed/elastic" not in line, lines))
    return [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said[-TAIL:]


def _evaluate(run: Path, data: Path) -> None:
    """Append to the run's results.jsonl, unless its newest checkpoint is there already."""
    step = int(resolve_release(str(run)).parent.name.removeprefix("step_"))
    print(f"  {run.name}", flush=True)
    done = {row["dataset"] for row in _results(run) if row["step"] == step}
    if done != {folder.name for folder in data.iterdir()}:
        with (run / "out.log").open("a", encoding="utf-8") as log, redirect_stdout(log):  # its tables would bury ours
            suite.run(EvalConfig(model=str(run), data=str(data), num_workers=0))


def _results(run: Path) -> list[dict]:
    path = run / "results.jsonl"
    return read_rows(path) if path.exists() else []


# Table --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the demo's table; several values where several seeds ran."""

    name: str
    parameters: int
    top1: list[float]  # 0..1
    image_to_text: list[float]  # recall@1 of captions for images, 0..1
    text_to_image: list[float]  # recall@1 of images for captions, 0..1
    samples_per_second: list[float]


def _row(name: str, runs: list[Path]) -> Row:
    scores = [{key: value for row in _results(run) for key, value in row["metrics"].items()} for run in runs]
    return Row(
        name=name,
        parameters=count_parameters(resolve_release(str(runs[0]))),
        top1=[score["acc1"] for score in scores],
        image_to_text=[score["text_retrieval_recall@1"] for score in scores],
        text_to_image=[score["image_retrieval_recall@1"] for score in scores],
        samples_per_second=[_speed(run) for run in runs],
    )


def _speed(run: Path) -> float:
    """Median over the logged rows: the first one contains the start-up."""
    return statistics.median(row["samples_per_second"] for row in read_rows(run / "metrics.jsonl"))


def table(rows: list[Row]) -> str:
    """The rows as aligned text: percentages, with mean +- standard deviation over seeds."""
    head = ["model", "parameters", "top-1", "image->text R@1", "text->image R@1", "samples/s"]
    lines = [head, *(list(_cells(row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [" | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join(["", text[0], "-+-".join("-" * width for width in widths), *text[1:]])


def _cells(row: Row) -> Iterator[str]:
    yield row.name
    yield f"{row.parameters:,}"
    for values in (row.top1, row.image_to_text, row.text_to_image):
        spread = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        yield f"{100 * statistics.mean(values):.1f}{spread} %"
    yield f"{statistics.mean(row.samples_per_second):,.0f}"


def _verdict(rows: list[Row]) -> str:
    teacher, student, baseline = rows
    gain = 100 * (statistics.mean(student.top1) - statistics.mean(baseline.top1))
    ratio = teacher.parameters / student.parameters
    return f"The student is {ratio:.1f} times smaller than the teacher; distillation adds {gain:+.1f} points of top-1."
