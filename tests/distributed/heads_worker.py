"""A student with every head and a masked view under an engine, against the same student alone; run by test_heads.py.

heads_worker.py TEACHER ENGINE-PRECISION ...        ENGINE: ddp | zero1 | zero2 | zero3; PRECISION: fp32 | bf16
"""

import os
import sys

import tiny
import torch

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.engine import Engine
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate
from kd_accel.types import Batch

ROWS = 4


def config(teacher: str, precision: str) -> TrainConfig:
    heads = {"projector": "mlp", "num_classes": 5, "prototype_head": {"hidden": 9, "width": 3, "layers": 2}}
    terms = {
        "ensemble": {"kind": "mobileclip"},
        "masked": {"kind": "masked_feature_mse", "teacher": "inner"},
        "label": {"kind": "label_ce"},
    }
    return validate(
        TrainConfig,
        {
            "name": "heads",
            "precision": precision,
            "data": {"shards": "none", "batch_size": ROWS, "label": "cls"},
            "student": {"arch": tiny.arch(22, 7, layers=2), "grad_checkpointing": True, **heads},
            "teachers": {"inner": {"path": teacher}, "outer": {"path": teacher, "placement": "replicated"}},
            "objective": {"terms": terms},
            "optim": {"lr": 1e-2, "steps": 9},
        },
    )


def batch() -> Batch:
    """Other rows on every rank."""
    generator = torch.Generator().manual_seed(7 + distributed.rank())
    image = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (ROWS, 12), generator=generator)
    return Batch(torch.arange(ROWS), image, dict.fromkeys(("student", "inner", "outer"), text))


def built(wanted: TrainConfig) -> tuple[Student, dict[str, Teacher]]:
    torch.manual_seed(1)
    teachers = {name: Teacher(section, name=name) for name, section in teachers_of(wanted).items()}
    dims = {name: teacher.embed_dim for name, teacher in teachers.items()}
    return Student(wanted.student, dims, mask_ratio=0.75).train(), teachers


def check_gradients(engine: Engine, alone: Student) -> None:
    """The sum over ranks of what a student alone has of its rows, for every parameter."""
    from deepspeed.utils import safe_get_full_grad

    full = safe_get_full_grad if engine.zero_stage else lambda parameter: parameter.grad
    ours = dict(engine.student.named_parameters())
    for name, parameter in alone.named_parameters():
        (expected,) = distributed.sum_over_ranks([parameter.grad])
        torch.testing.assert_close(full(ours[name]).float(), expected, rtol=1e-3, atol=1e-4)


def check(teacher: str, name: str, precision: str) -> None:
    stage = int(name.removeprefix("zero")) if name.startswith("zero") else 0
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if stage else "false"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
    wanted = config(teacher, precision)
    accelerator = start_accelerator(precision=precision, batch_size=ROWS, grad_clip_norm=1.0)
    alone, (student, teachers) = built(wanted)[0], built(wanted)
    engine = Engine(accelerator, student, teachers, optimizer=build_optimizer(student, wanted.optim), config=wanted)
    engine.module.train()

    torch.manual_seed(5)  # of the masks
    features, said = engine.forward([batch()])
    torch.manual_seed(5)
    expected = alone(batch().image, batch().text["student"])
    assert {key: rows.shape[1] for key, rows in features.items()} == student.widths
    assert said.keys() == {"inner", "outer"}
    assert not torch.equal(features["image"], features["masked_image"])
    gradients = {key: torch.randn(rows.shape) for key, rows in features.items()}
    engine.backward(gradients)
    if precision == "fp32":
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        sum((expected[key] * gradients[key]).sum() for key in expected).backward()
        check_gradients(engine, alone)
    applied, _ = engine.step(1e-2)
    assert applied

    engine.module.eval()
    with torch.no_grad():
        features, _ = engine.forward([batch()])
    torch.testing.assert_close(features["masked_image"], features["image"])
    end_accelerator()


def main() -> None:
    teacher, *cases = sys.argv[1:]
    for case in cases:
        print(case, flush=True)
        check(teacher, *case.split("-"))
    processes.end_process(0)


if __name__ == "__main__":
    main()
