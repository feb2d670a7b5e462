"""A model of shapes alone takes the way that a real one takes: the same operations, bytes and types."""

from __future__ import annotations

from contextlib import nullcontext

import open_clip
import pytest
import timm
import torch
from transformers import BertConfig, BertModel

from kd_accel.plan.shapes import shapes_only, tensors_in
from kd_accel.plan.watch import Watch

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 12, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 2}


def clip():
    return open_clip.CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT), [torch.rand(3, 3, 32, 32), tokens()]


def resnet():
    return timm.create_model("resnet18", num_classes=16), [torch.rand(3, 3, 64, 64)]


def convnext(drop_path_rate=0.0):
    """Which asks a tensor for its numbers, and drops nothing where they are 0."""
    model = timm.create_model("convnext_atto", num_classes=16, drop_path_rate=drop_path_rate)
    return model, [torch.rand(3, 3, 64, 64)]


def dropping():
    return convnext(0.1)


def bert():
    config = BertConfig(
        vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return BertModel(config), [tokens()]


def tokens():
    return torch.ones(3, 12, dtype=torch.int64)


def watched(build, way, passes):
    """(FLOPs, bytes held after the forward pass, bytes at most, types and shapes of what comes out)."""
    with way(), passes():
        model, given = build()
        with Watch() as watch:
            with torch.autocast("cpu", torch.bfloat16):
                said = list(tensors_in(model(*given)))
            held = watch.held
            if said[0].requires_grad:
                sum(x.float().sum() for x in said).backward()
        return watch.flops, held, watch.peak, [(x.dtype, x.shape, x.stride(), x.device) for x in said]


@pytest.mark.parametrize("passes", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("build", [clip, resnet, convnext, dropping, bert])
def test_shapes_go_the_way_of_tensors(build, passes):
    assert watched(build, shapes_only, passes) == watched(build, nullcontext, passes)
