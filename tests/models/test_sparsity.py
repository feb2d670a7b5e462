"""2:4 sparsity: which weights stay, that the others stay zero through training, and what a release is."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from kd_accel import checkpoint
from kd_accel.config import TrainConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.models.sparsity import best_two_of_four, sparsify, without_masks
from kd_accel.schema import ConfigError, validate
from kd_accel.train import run

WEIGHTS = "open_clip_model.safetensors"


def is_two_of_four(weight: torch.Tensor) -> bool:
    """At most two of every four neighbouring inputs of an output, at every place of the kernel, are not zero."""
    return bool(((weight.movedim(1, -1).unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


@pytest.mark.parametrize("shape", [(8, 16), (8, 32, 3, 3)])
def test_the_two_largest_of_four_stay(shape):
    """By brute force, one group of four at a time."""
    weight = torch.randn(shape)
    mask = best_two_of_four(weight)
    for kept, group in zip(
        mask.movedim(1, -1).reshape(-1, 4).tolist(), weight.movedim(1, -1).reshape(-1, 4), strict=True
    ):
        largest = sorted(range(4), key=lambda i: -abs(group[i].item()))[:2]  # noqa: B023
        assert [i for i in range(4) if kept[i]] == sorted(largest)


def test_of_equal_weights_the_first_stay():
    assert best_two_of_four(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_which_layers_are_eligible():
    """By their sizes, groups and use; those that are frozen stay dense."""
    frozen = nn.Linear(16, 8).requires_grad_(False)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(32, 8),
            "odd_inputs": nn.Linear(20, 8),
            "odd_outputs": nn.Linear(16, 4),
            "conv": nn.Conv2d(16, 8, 3),
            "depthwise": nn.Conv2d(16, 16, 3, groups=16),
            "attention": nn.MultiheadAttention(16, 2),
            "frozen": frozen,
        }
    )
    before = frozen.weight.clone()
    assert sparsify(model) == {"linear": 256, "conv": 16 * 8 * 9}
    assert is_two_of_four(model["linear"].weight)
    assert is_two_of_four(model["conv"].weight)
    assert frozen.weight.equal(before)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(16, 8), (3, 16)), (nn.Conv2d(16, 8, 3, padding=1), (2, 16, 5, 5))]
)
def test_masked_weights_get_no_gradient(layer, shape):
    """And the output is that of a dense layer with the zeros in its weight."""
    model = nn.Sequential(layer)
    sparsify(model)
    mask = layer.sparsity_mask
    x = torch.randn(shape)
    dense = type(layer).__bases__[0].forward(layer, x)
    torch.testing.assert_close(model(x), dense)
    model(x).square().sum().backward()
    assert (layer.weight.grad[~mask] == 0).all()
    assert (layer.weight.grad[mask] != 0).any()


def test_a_state_without_masks_is_a_dense_models():
    model = nn.Sequential(nn.Linear(16, 8))
    keys = set(model.state_dict())
    sparsify(model)
    assert set(without_masks(model.state_dict())) == keys


@pytest.fixture
def train(tmp_path, train_shards):
    """A function that trains a student and returns the run's folder."""

    def go(name, steps=4, **changes):
        values = {
            "name": name,
            "output_dir": str(tmp_path / "runs"),
            "precision": "fp32",
            "data": {"shards": str(train_shards), "batch_size": 8, "num_workers": 0},
            "student": {"arch": tiny.arch()},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            "optim": {"lr": 1e-2, "steps": steps, "weight_decay": 0.1},
            "save": {"every_steps": 2},
        }
        run(validate(TrainConfig, values | changes))
        return tmp_path / "runs" / name

    return go


def released(folder) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(folder) / "student" / WEIGHTS)


def test_dense_then_sparse_training(tmp_path, train):
    """The pattern is that of the dense run's weights, holds after training, and the release is an ordinary one."""
    dense = train("dense")
    student = {"arch": tiny.arch(), "init": str(dense)}
    sparse = train("sparse", student=student, compress={"sparsity": "2:4"}, train={"ema_decay": 0.5})
    before, after = released(dense), released(sparse)
    assert after.keys() == before.keys()
    masked = [key for key, weight in after.items() if weight.ndim >= 2 and (weight == 0).float().mean() == 0.5]
    assert {key.split(".")[-2] for key in masked} >= {"c_fc", "c_proj"}
    for key in masked:
        mask = best_two_of_four(before[key])
        assert ((after[key] != 0) == mask).all()
        assert not after[key][mask].equal(before[key][mask])  # it learnt
    averaged = load_file(checkpoint.newest(sparse) / "student_ema" / WEIGHTS)
    assert all(((averaged[key] != 0) <= best_two_of_four(before[key])).all() for key in masked)
    assert load_encoder(sparse).encode_texts(["a"]).isfinite().all()


def test_a_sparse_run_goes_on_with_its_masks(tmp_path, train):
    """Even if the run that it started from has moved on meanwhile; it ends where an uninterrupted one does."""
    dense = train("dense", steps=2)
    student, compress = {"arch": tiny.arch(), "init": str(dense)}, {"sparsity": "2:4"}
    whole = train("whole", student=student, compress=compress)
    train("dense", steps=6, resume="auto", optim={"lr": 1e-1, "steps": 6, "weight_decay": 0.1})
    from_middle = str(whole / "checkpoints" / "step_00000002")
    branch = train("branch", student=student, compress=compress, resume=from_middle)
    ours, theirs = released(branch), released(whole)
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_an_untrained_student_has_no_weights_to_choose_from(train):
    with pytest.raises(ConfigError, match="compress.sparsity keeps the largest weights.*student.init"):
        train("sparse", compress={"sparsity": "2:4"})


def test_a_student_without_eligible_layers_is_said(tmp_path, train):
    odd = tiny.arch(width=12)
    odd["text_cfg"]["width"] = 12
    dense = train("dense", student={"arch": odd})
    with pytest.raises(ConfigError, match="no layer of the student can be sparse"):
        train("sparse", student={"arch": odd, "init": str(dense)}, compress={"sparsity": "2:4"})
