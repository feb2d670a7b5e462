"""The configs that carry the objectives of other systems, each trained for three steps on tiny data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import tiny_hf

from kd_accel.config import TrainConfig
from kd_accel.config_files import load
from kd_accel.models.release import read_release, write_release
from kd_accel.schema import validate
from kd_accel.train import run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Sizes that tiny data cannot have; everything else is as in the file.
SMALLER = {
    "fastclip_kd": [],
    "l1_ce_kl": ["student.projector=linear"],
    "l1_ce_kl_text": ["data.sources.conceptual=null", "data.sources.coco=null", "student.projector=linear"],
    "embedding_labels": ["teacher.placement=engine", "teacher.store=null", "student.projector=linear"],
    "labels_only": ["student.num_classes=4"],
    "proto_rkd": [],
    "disttempnet_resnet": ["objective.terms.gcl.network.prototypes=6"],
    "protoclip": [
        "objective.terms.prototype.clusters=3",
        "objective.terms.prototype.episode_samples=16",
        "objective.terms.prototype.weight=1",
        "student.prototype_head.hidden=16",
    ],
    "disttempnet": ["objective.terms.gcl.network.prototypes=6"],
    "mobileclip": [],
    "clip_kd": [],
}


@pytest.mark.parametrize("name", SMALLER)
def test_three_steps(name, tmp_path, train_shards, tiny_teacher):
    """Every loss is a number, the student moves, and the run ends with a checkpoint."""
    (tmp_path / "classes.txt").write_text("red square\ngreen square\nblue square\nyellow square\n")
    config = load(TrainConfig, [CONFIGS / f"{name}.yaml"], _tiny(name, tmp_path, train_shards, tiny_teacher))
    run(config)
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses = [row[key] for row in rows for key in row if key.startswith("loss")]
    assert len(losses) == 3 * (1 + len(config.objective.terms))
    assert all(math.isfinite(loss) for loss in losses)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert (tmp_path / name / "checkpoints" / "step_00000003").is_dir()


def _tiny(name: str, tmp_path, train_shards, tiny_teacher) -> list[str]:
    """Overrides that put the file on tiny shards, a tiny student and tiny teachers."""
    written = load(TrainConfig, [CONFIGS / f"{name}.yaml"])
    width = 12 if written.teacher or written.teachers else 8  # the tiny teacher's, where there is no projector
    projected = written.student.projector or "student.projector=linear" in SMALLER[name]
    arch = tiny.arch(embed_dim=8 if projected else width)
    if alone := {"l1_ce_kl": "text_cfg", "l1_ce_kl_text": "vision_cfg"}.get(name):
        arch[alone] = None
    if name == "disttempnet_resnet":
        hf = tiny_hf.write_text_model(tmp_path / "hf", "distilbert")
        arch = {
            "vision_cfg": {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "image_size": 32},
            "text_cfg": {"hf_model_name": str(hf)},
        }
    if name == "proto_rkd":
        arch = {"embed_dim": width, "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 32}}
    source = {"data.folder": None, "data.table": None, "data.shards": str(train_shards)}
    source |= {"data.label": "cls"} if written.data.label else {}
    overrides = [
        *(f"output_dir={tmp_path}", "data.batch_size=8", "data.num_workers=0", "student.embed_dim=null"),
        *(f"{key}={json.dumps(value)}" for key, value in source.items()),
        *(f"student.arch={json.dumps(arch)}", "precision=fp32", "optim.epochs=null", "optim.steps=3"),
        *("optim.warmup_steps=0", "log.every_steps=1"),
    ]
    teachers = [f"teachers.{each}" for each in written.teachers] or (["teacher"] if written.teacher else [])
    for teacher in teachers:
        overrides += [f"{teacher}.arch=null", f"{teacher}.pretrained=null", f"{teacher}.path={tiny_teacher}"]
    if name == "embedding_labels":
        overrides.append(f"objective.terms.label.classes={tmp_path}/classes.txt")
    return overrides + SMALLER[name]


def test_siglip_on_both_sides(tmp_path, train_shards, tiny_teacher):
    """A student on the sigmoid loss learns from a SigLIP teacher in the KD terms; rows of logits ignore its bias."""
    runs = {}
    for name, bias in (("with_bias", -10.0), ("without", None)):
        model, contract, model_cfg, _ = read_release(tiny_teacher)
        scales = {"log_scale": math.log(10), "logit_bias": bias}
        write_release(
            tmp_path / f"teacher_{name}", state=model.state_dict(), model_cfg=model_cfg, contract=contract, **scales
        )
        run(_siglip(name, tmp_path, train_shards))
        runs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for ours, theirs in zip(*runs.values(), strict=True):
        losses = {key: value for key, value in ours.items() if key.startswith(("loss", "confidence"))}
        assert len(losses) == 2 + len(SIGLIP_TERMS)
        assert losses == {key: theirs[key] for key in losses}


SIGLIP_TERMS = {
    "siglip": {"kind": "siglip"},
    "feature": {"kind": "feature_mse", "confidence": True},
    "kl": {"kind": "logit_kl"},
    "affinity": {"kind": "affinity"},
    "icl": {"kind": "interactive_contrastive"},
    "cross": {"kind": "cross_kl"},
    "gradient": {"kind": "gradient"},
}


def _siglip(name: str, tmp_path, train_shards) -> TrainConfig:
    values = {"name": name, "output_dir": str(tmp_path), "precision": "fp32", "log": {"every_steps": 1}}
    values |= {"data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0}}
    values |= {"student": {"arch": tiny.arch(embed_dim=12)}, "teacher": {"path": str(tmp_path / f"teacher_{name}")}}
    objective = {"terms": SIGLIP_TERMS, "logit_bias": -10.0, "temperature": {"init": 0.1}}
    return validate(TrainConfig, values | {"objective": objective, "optim": {"lr": 1e-2, "steps": 3}})
