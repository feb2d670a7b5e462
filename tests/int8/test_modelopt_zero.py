"""INT8 training under ZeRO: ranges are those of one process, the weights of the masters are 2:4 and learn."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch
from conftest import run_process
from distributed.test_resume import TWO, zero
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.models.int8_state import FILE
from kd_accel.models.sparsity import best_two_of_four

pytestmark = pytest.mark.distributed

ONE_LAYER = "student.arch={embed_dim: 12, vision_cfg: {image_size: 32, patch_size: 8, width: 32, layers: 1, "
ONE_LAYER += "head_width: 16}, text_cfg: {context_length: 12, vocab_size: 49408, width: 32, heads: 2, layers: 1}}"


def released(folder, launcher, shards, teacher, precision, env) -> tuple[dict, dict]:
    """(weights, what the quantisers hold) after four steps of 8."""
    words = [
        *launcher, "-m", "kd_accel", "train", f"name={folder.name}", f"output_dir={folder.parent}", ONE_LAYER,
        f"data={{shards: {shards}, global_batch_size: 8, num_workers: 0}}", f"precision={precision}",
        f"student.init={teacher}", "objective.terms={clip: {kind: clip}}", "optim={lr: 0.001, steps: 4, eps: 0.01}",
        "compress={sparsity: '2:4', int8: modelopt}",
    ]  # fmt: skip
    run_process(words, env=env)
    student = checkpoint.newest(folder) / "student"
    return load_file(student / "open_clip_model.safetensors"), load_file(student / FILE)


@pytest.mark.parametrize(
    ("stage", "precision"), [(2, "bf16"), pytest.param(3, "fp32", marks=pytest.mark.slow)], ids=["ZeRO-2", "ZeRO-3"]
)
def test_two_ranks_quantise_as_one(stage, precision, tmp_path, train_shards):
    """Ranges to the bit, in bf16 too; in fp32 the weights are those of one process, up to the order of sums."""
    pytest.importorskip("modelopt", reason='the extra "quant" is not installed')
    teacher = tiny.write_teacher(tmp_path / "teacher", tiny.arch(32, 12))
    before = load_file(teacher / "open_clip_model.safetensors")
    one, ranges = released(tmp_path / "one", [sys.executable], train_shards, teacher, "fp32", {})
    two, theirs = released(tmp_path / "two", TWO, train_shards, teacher, precision, zero(stage))
    assert theirs.keys() == ranges.keys()
    assert all(theirs[key].equal(ranges[key]) for key in ranges)
    masked = [key for key, weight in two.items() if weight.ndim > 1 and (weight == 0).float().mean() == 0.5]
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" in masked
    for key in masked:
        mask = best_two_of_four(before[key])
        assert torch.equal(two[key] != 0, mask)
        assert not torch.equal(two[key][mask], before[key][mask])
    if precision == "fp32":
        moved = max((one[key] - before[key]).abs().max() for key in masked)
        assert all((two[key] - one[key]).abs().max() < moved / 100 for key in one)
