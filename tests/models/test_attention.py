"""Packed self-attention: the features and gradients of torch's own, and its own where it is more than that."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
from torch import Tensor, nn

from kd_accel import assembly
from kd_accel.config import TrainConfig
from kd_accel.models.attention import PackedAttention, pack_attention
from kd_accel.schema import validate

ROWS, TOKENS, WIDTH = 3, 7, 24


def both(heads: int = 4, **options) -> tuple[nn.Module, nn.Module]:
    """(torch's, ours) with the same weights."""
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, heads, batch_first=True, dtype=torch.float64, **options)
    nn.init.normal_(plain.in_proj_bias) if plain.in_proj_bias is not None else None
    packed = deepcopy(plain)
    pack_attention(packed)
    return plain, packed


def masks(heads: int) -> dict[str, Tensor | None]:
    causal = torch.full((TOKENS, TOKENS), float("-inf"), dtype=torch.float64).triu(1)
    of_heads = torch.randn(ROWS * heads, TOKENS, TOKENS, dtype=torch.float64)
    return {"none": None, "added": causal, "by head": of_heads, "bool": causal < 0, "bool by head": of_heads > 1}


@pytest.mark.parametrize("mask", masks(1))
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_features_and_gradients_are_torchs(heads, mask):
    plain, packed = both(heads)
    given = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    torch.manual_seed(1)
    found = []
    for module in (plain, packed):
        rows = given.clone().requires_grad_()
        torch.manual_seed(1)
        said, weights = module(rows, rows, rows, need_weights=False, attn_mask=masks(heads)[mask])
        assert weights is None
        said.square().sum().backward()
        found.append([said, rows.grad, *(p.grad for p in module.parameters())])
    assert type(packed) is PackedAttention
    for ours, torchs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def test_dropout_drops_in_training_only():
    _, packed = both(dropout=0.5)
    rows = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    first, second = (packed(rows, rows, rows, need_weights=False)[0] for _ in range(2))
    assert not torch.equal(first, second)
    packed.eval()
    first, second = (packed(rows, rows, rows, need_weights=False)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("words", [{}, {"need_weights": True}, {"need_weights": False, "key_padding_mask": True}])
def test_what_is_more_is_torchs(words):
    """Weights that are asked for, rows that are padded."""
    plain, packed = both()
    rows = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    padded = torch.arange(TOKENS).expand(ROWS, -1) > 4
    words = {**words, "key_padding_mask": padded} if "key_padding_mask" in words else words
    for ours, torchs in zip(packed(rows, rows, rows, **words), plain(rows, rows, rows, **words), strict=True):
        assert ours is torchs is None or torch.equal(ours, torchs)


def test_other_keys_are_torchs():
    plain, packed = both()
    query, other = torch.randn(2, ROWS, TOKENS, WIDTH, dtype=torch.float64)
    ours, torchs = (module(query, other, other, need_weights=False)[0] for module in (packed, plain))
    assert torch.equal(ours, torchs)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 8, "vdim": 8}])
def test_what_has_more_stays_torchs(options):
    module = nn.MultiheadAttention(WIDTH, 4, batch_first=True, **options)
    pack_attention(module)
    assert type(module) is nn.MultiheadAttention


def test_rows_that_come_second_stay_torchs():
    module = nn.MultiheadAttention(WIDTH, 4)
    pack_attention(module)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.parametrize("int8", [None, "torchao"])
def test_students_and_teachers_of_a_training_have_it(int8, train_shards, tiny_teacher, tmp_path):
    """Except a student whose quantisers a release is to find again. State keys are those of open_clip."""
    sections = {
        "name": "run",
        "data": {"shards": str(train_shards), "batch_size": 4},
        "student": {"arch": tiny.arch(), "init": str(tiny.write_teacher(tmp_path / "trained", tiny.arch()))},
        "teacher": {"path": str(tiny_teacher)},
        "objective": {"terms": {"kl": {"kind": "logit_kl"}}},
        "optim": {"lr": 1e-3, "steps": 1},
        "compress": {"int8": int8},
    }
    config = validate(TrainConfig, sections)
    teachers = assembly.build_teachers(config)
    models = {"student": assembly.build_student(config, teachers), **teachers}
    for name, model in models.items():
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
        assert kinds == {nn.MultiheadAttention if name == "student" and int8 else PackedAttention}
        assert "clip.visual.transformer.resblocks.0.attn.in_proj_weight" in model.state_dict()
