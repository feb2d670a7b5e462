"""Run by test_pair.py under torchrun: Pair in a DeepSpeed ZeRO-3 engine against the plain Pair, on the same input.

torchrun --nproc_per_node 2 tests/models/zero3_worker.py RELEASE
"""

from __future__ import annotations

import os
import sys

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed

from kd_accel import processes
from kd_accel.models.pair import Pair
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.sections import StudentConfig, TeacherConfig

ARCH = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
}


def build(release: str, dtype: torch.dtype) -> Pair:
    torch.manual_seed(0)
    student = StudentConfig(arch=ARCH, projector="linear", grad_checkpointing=True)
    teacher = Teacher(TeacherConfig(path=release))
    return Pair(Student(student, {"teacher": teacher.embed_dim}), {"teacher": teacher}).to(dtype)


def loss(out: dict) -> torch.Tensor:
    return sum((row.float() ** 2).sum() for row in out["student"].values())


def compare(release: str, dtype: torch.dtype) -> None:
    """Two steps of SGD; every rank sees the same batch, so that the mean of the gradients is each one's."""
    bf16 = dtype == torch.bfloat16
    plain, pair = build(release, dtype), build(release, dtype)
    trained = [p for p in pair.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=pair, optimizer=torch.optim.SGD(trained, lr=0.1), config=config)
    assert next(pair.student.clip.visual.parameters()).numel() == 0, "nothing is partitioned: this would prove nothing"

    generator = torch.Generator().manual_seed(1)
    view = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = dict.fromkeys(
        ("student", "teacher"), plain.student.contract.text.tokenize(["a cat", "two dogs", "three birds"])
    )
    # ZeRO-3 rounds a linear layer's product and bias apart in bf16: compare to a few dozen roundings of 2^-9.
    tolerance = {"rtol": 0.1, "atol": 0.1} if bf16 else {"rtol": 1e-5, "atol": 1e-6}
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        out, expected = engine(view, tokens), plain(view, tokens)
        torch.testing.assert_close(out, expected, **tolerance)
        engine.backward(loss(out))
        engine.step()
        optimizer.zero_grad()
        loss(expected).backward()
        optimizer.step()


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for half a minute
deepspeed.init_distributed("gloo")
compare(sys.argv[1], torch.float32)
compare(sys.argv[1], torch.bfloat16)
processes.end_process(0)
