"""What a run in bf16 releases: the fp32 weights behind its engine, and no copy that was rounded."""

from __future__ import annotations

import pytest
import torch
from conftest import run_process
from distributed.test_resume import TWO, command, zero
from safetensors.torch import load_file

from kd_accel import checkpoint
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig
from kd_accel.models.release_folder import WEIGHTS

pytestmark = pytest.mark.distributed


def test_the_masters_of_zero_2_are_exported(tmp_path, train_shards, tiny_teacher):
    """To the bit, by open_clip's names; all that was trained has digits that bf16 has not."""
    words = [w for w in command(TWO, tmp_path, train_shards, tiny_teacher, "run") if not w.startswith("objective")]
    extra = [
        "objective.terms={clip: {kind: clip}, kl: {kind: logit_kl}}",
        "student.projector=null",
        "optim={lr: 0.01, steps: 3}",
    ]
    run_process([*words, *extra, "precision=bf16"], env=zero(2))
    run(ExportConfig(model=str(tmp_path / "run"), out=str(tmp_path / "out"), format="transformers"))
    masters = load_file(checkpoint.newest(tmp_path / "run") / "state" / "weights.safetensors")
    masters = {key.removeprefix("clip."): weight for key, weight in masters.items()}
    released = load_file(tmp_path / "out" / WEIGHTS)
    assert masters.keys() == released.keys() - {"logit_scale"}
    for key, weight in masters.items():
        assert (weight.dtype, released[key].dtype) == (torch.float32, torch.float32)
        assert released[key].equal(weight), key
        assert not weight.equal(weight.bfloat16().float()), key
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert theirs["visual_projection.weight"].equal(masters["visual.proj"].T)
