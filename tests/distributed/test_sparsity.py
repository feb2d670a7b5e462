"""2:4 sparsity under ZeRO, whose master copies know nothing of masks: the release has the pattern all the same."""

from __future__ import annotations

import pytest
import torch
from conftest import run_process
from distributed.test_resume import TWO, command, zero
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.models.sparsity import best_two_of_four

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("stage", "precision"), [(2, "bf16"), pytest.param(3, "fp32", marks=pytest.mark.slow)], ids=["ZeRO-2", "ZeRO-3"]
)
def test_two_of_four_stay_zero(stage, precision, tmp_path, train_shards, tiny_teacher):
    """In the fp32 masters that are released: exactly those that the dense weights leave, and the others are trained."""
    arch = (
        "student.arch={embed_dim: 12, vision_cfg: {image_size: 32, patch_size: 8, width: 24, layers: 1, head_width: 12}"
    )
    student = [
        f"{arch}, text_cfg: {{context_length: 12, vocab_size: 49408, width: 24, heads: 2, layers: 1}}}}",
        "student.init=teacher",
        "student.projector=null",
    ]
    terms = "objective={terms: null}", "objective.terms={kl: {kind: logit_kl}, clip: {kind: clip}}"
    wanted = [*student, *terms, "compress.sparsity=2:4", "optim={lr: 0.01, steps: 4}", f"precision={precision}"]
    words = [w for w in command(TWO, tmp_path, train_shards, tiny_teacher, "sparse") if not w.startswith("objective")]
    run_process([*words, *wanted], env=zero(stage))
    before = load_file(tiny_teacher / "open_clip_model.safetensors")
    after = load_file(checkpoint.newest(tmp_path / "sparse") / "student" / "open_clip_model.safetensors")
    masked = [key for key, weight in after.items() if weight.ndim > 1 and (weight == 0).float().mean() == 0.5]
    assert masked
    for key in masked:
        mask = best_two_of_four(before[key])
        assert torch.equal(after[key] != 0, mask)
        assert not torch.equal(after[key][mask], before[key][mask])
