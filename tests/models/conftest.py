"""Small CLIPs of each kind that open_clip builds, and a picture to show them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_accel.models.release import write_release
from kd_accel.models.student import Student
from kd_accel.sections import StudentConfig

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "timm": {"image_size": 32, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}


@pytest.fixture
def arch():
    """arch(kind, vision={...}, text={...}, **top): a model_cfg with some keys changed."""

    def make(kind: str = "vit", *, vision: dict | None = None, text: dict | None = None, **top: Any) -> dict[str, Any]:
        return {
            "embed_dim": 16,
            "vision_cfg": deepcopy(VISION[kind]) | (vision or {}),
            "text_cfg": TEXT | (text or {}),
        } | top

    return make


@pytest.fixture
def student(arch):
    """student(kind, **config): a Student with the same weights each time, in training mode."""

    def make(
        kind: str = "vit", *, teacher_dim: int | None = None, mask_ratio: float | None = None, **config: Any
    ) -> Student:
        torch.manual_seed(0)
        dims = {} if teacher_dim is None else {"teacher": teacher_dim}
        return Student(StudentConfig(**{"arch": arch(kind)} | config), dims, mask_ratio=mask_ratio)

    return make


@pytest.fixture
def release(tmp_path, student):
    """release(kind, folder=..., log_scale=..., logit_bias=...): the release directory of `student(kind)`."""

    def make(
        kind: str = "vit", *, folder: Path | None = None, log_scale: float = 2.5, logit_bias: float | None = None
    ) -> Path:
        model = student(kind)
        folder = folder or tmp_path / "release"
        write_release(
            folder,
            state=model.release_state(model.state_dict()),
            model_cfg=model.model_cfg,
            contract=model.contract,
            log_scale=log_scale,
            logit_bias=logit_bias,
        )
        return folder

    return make


@pytest.fixture
def view():
    """[3, 3, 32, 32] uint8."""
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captions() -> list[str]:
    return ["a photo of a cat", "Two DOGS, it's  a na\u00efve caf\u00e9 &amp; 3.14!", "long " * 40]
