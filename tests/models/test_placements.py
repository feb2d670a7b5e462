"""Wherever a teacher is, and whatever of it is stored, it says the same of a batch: to the precision it is kept in.

Letters: r rows of the first dimension of a weight, n its numbers.
"""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path

import embed_run
import pytest
import tiny
import torch
from embed_run import FP16
from torch import Tensor, nn

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.embed import verb
from kd_accel.engine import Engine
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.models.int8 import quantise
from kd_accel.models.teacher import Teacher
from kd_accel.optim import build_optimizer
from kd_accel.sections import TeacherConfig

BF16 = 2**-8  # of a number: half of the last of its 8 bits
WEIGHTS = 7  # in a row from caption to feature: embeddings, attention's two, the layer's two, the projection
# Rounding to 1/127 of the largest is uniform noise of 1 / (127 sqrt 12) of it, and the largest of a row of some dozens
# of normal numbers is about 2.5 of their deviations: 0.6 % per weight, here as if all pointed the same way.
INT8 = 2.5 / (127 * 12**0.5) * WEIGHTS
TOLERANCE = {"engine": 0.0, "replicated": 0.0, "int8": INT8, "cached": FP16, "hybrid": FP16}

SIGLIP = {
    "embed_dim": 12,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "vision_cfg": tiny.arch(24, 12)["vision_cfg"] | {"pool_type": "avg"},
    "text_cfg": tiny.arch(24, 12)["text_cfg"] | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
}
ONE_TOWER = {"embed_dim": 12, "vision_cfg": tiny.arch(24, 12)["vision_cfg"]}
RESNET = {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
TEACHERS = {
    "48 px": tiny.arch(24, 12, image_size=48),
    "SigLIP-like": SIGLIP,
    "one tower": ONE_TOWER,
    "ResNet": tiny.arch(24, 12) | {"vision_cfg": RESNET},  # its first parameter is a kernel
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Read only."""
    return embed_run.write_data(tmp_path_factory.mktemp("placements") / "shards")


@pytest.fixture(scope="module")
def keep(data, tmp_path_factory):
    """keep(kind): a teacher's release, stores of all its towers and of one of them, and what it says in the engine."""

    @cache
    def make(kind: str) -> dict:
        folder = tmp_path_factory.mktemp("kept")
        release = tiny.write_teacher(folder / "release", TEACHERS[kind])
        made = {"folder": folder, "release": release, "cached": folder / "cached", "hybrid": folder / "hybrid"}
        for name, towers in (("cached", None), ("hybrid", ["image"] if kind == "one tower" else ["text"])):
            wanted = {"out": str(made[name]), "towers": towers, "objective": objective(kind), "verify": 0}
            verb.run(embed_run.embed_config(folder, data, release, **wanted))
        made["exact"] = said(embed_run.train_config(folder, data, release, objective=objective(kind)))
        return made

    return make


def objective(kind: str) -> dict:
    match = {"image": "image"} if kind == "one tower" else {"image": "image", "text": "text"}
    return {"terms": {"clip": {"kind": "clip"}, "mse": {"kind": "embedding_mse", "match": match}}}


def section(kept: dict, placement: str) -> dict:
    match placement:
        case "cached":
            return {"placement": "cached", "store": str(kept["cached"])}
        case "hybrid":
            return {"path": str(kept["release"]), "placement": "replicated", "store": str(kept["hybrid"])}
    return {"path": str(kept["release"]), "placement": placement}


def said(config: TrainConfig) -> list[dict[str, Tensor]]:
    """The teacher's features of three steps of two micro-batches, as the objective gets them."""
    accelerator = start_accelerator(precision=config.precision, batch_size=4, grad_clip_norm=1.0)
    try:
        torch.manual_seed(config.seed)
        teachers = assembly.build_teachers(config)
        student = assembly.build_student(config, teachers)
        config = assembly.fit_models(config, student, teachers)
        loader = assembly.build_loader(config, student, teachers)
        optimizer = build_optimizer(student, config.optim)
        engine = Engine(accelerator, student, teachers, optimizer=optimizer, config=config)
        engine.module.train()
        return [engine.forward(micro_batches)[1]["teacher"] for micro_batches in islice(loader, 3)]
    finally:
        end_accelerator()


CASES = [(kind, placement, "fp32") for kind in TEACHERS for placement in TOLERANCE]
CASES += [("48 px", placement, "bf16") for placement in TOLERANCE]


@pytest.mark.parametrize(("kind", "placement", "precision"), CASES)
def test_every_placement_says_the_same(keep, data, kind, placement, precision):
    """The norm of the difference as a share of the features' norm, against a fp32 teacher in the engine."""
    kept, tolerance = keep(kind), TOLERANCE[placement]
    changes = {"objective": objective(kind), "teacher": section(kept, placement), "precision": precision}
    if precision == "bf16" and placement != "cached":
        tolerance += BF16 * (3 * WEIGHTS) ** 0.5  # each layer's input, weight and output are rounded
    found = said(embed_run.train_config(kept["folder"], data, kept["release"], **changes))
    differences = []
    for ours, wanted in zip(found, kept["exact"], strict=True):
        assert ours.keys() == wanted.keys()
        differences += [((ours[tower].float() - rows).norm() / rows.norm()).item() for tower, rows in wanted.items()]
    assert max(differences) <= tolerance
    assert (max(differences) > 0) == (tolerance > 0), "not what it is called"


def test_int8_holds_a_quarter_of_the_bytes():
    """A byte per number of a matrix and four per row of it; biases and norms stay as they are."""
    module = nn.Sequential(nn.Conv2d(3, 64, 8), nn.Linear(512, 512), nn.MultiheadAttention(256, 4), nn.LayerNorm(256))
    module.requires_grad_(False)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    expected = sum(s.numel() + 4 * s[0] if len(s) > 1 else 4 * s.numel() for s in shapes.values())
    whole = 4 * sum(s.numel() for s in shapes.values())
    quantise(module)
    held = sum(p.nbytes for p in [*module.parameters(), *module.buffers()])
    assert held == expected
    assert 0.25 < held / whole < 0.27
    assert {tuple(p.shape) for p in (module[0].weight, module[1].weight, module[2].in_proj_weight)} == {
        tuple(shapes[name]) for name in ("0.weight", "1.weight", "2.in_proj_weight")
    }


def test_int8_weights_are_off_by_half_a_step():
    """Of 1/127 of the row's largest; zero rows stay zero; .to(bfloat16) rounds the weight, not its scale."""
    module = nn.Linear(64, 40, bias=False).requires_grad_(False)
    weight = torch.randn(40, 64) * torch.logspace(-5, 3, 40)[:, None]
    weight[7] = 0
    module.weight.copy_(weight)
    quantise(module)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((module.weight - weight).abs() <= step / 2 * (1 + 1e-4)).all()
    assert not module.weight[7].any()
    exact = module.weight.clone()
    assert module.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert module.weight.equal(exact.bfloat16())


def test_int8_takes_no_gradients(tiny_teacher):
    """Frozen, outside of the engine, and its weights cannot be trained by mistake."""
    teacher = Teacher(TeacherConfig(path=str(tiny_teacher)))
    quantise(teacher)
    assert not [p for p in teacher.parameters() if p.requires_grad]
    with pytest.raises(AssertionError, match="int8 weights cannot be trained"):
        quantise(nn.Linear(2, 2))
