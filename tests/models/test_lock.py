"""Frozen towers: the same parameters as open_clip's own lock leaves, statistics that stay, mistakes."""

from __future__ import annotations

import pytest
import tiny_hf
import torch
from accelerate import init_empty_weights
from open_clip import CustomTextCLIP
from torch import nn

from kd_accel.models.lock import lock
from kd_accel.models.timm_towers import build_timm
from kd_accel.models.torchvision_towers import build_torchvision
from kd_accel.models.towers import construct
from kd_accel.models.two_towers import TwoTowers
from kd_accel.schema import ConfigError


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("logit_")}


@pytest.mark.parametrize("groups", [0, 1, 2, 3])
@pytest.mark.parametrize("custom_text", [False, True])
def test_groups_are_open_clips(custom_text, groups, arch):
    """Of a CLIP's two towers, and of a text tower under `text`, with a class embedding of its own; all four groups."""
    text = {"layers": 2, "embed_cls": custom_text, "pad_id": 0}
    ours, theirs = (construct(arch(text=text, custom_text=custom_text), where="x") for _ in range(2))
    lock(ours, {"image": groups, "text": groups})
    theirs.lock_image_tower(unlocked_groups=groups)
    theirs.lock_text_tower(unlocked_layers=groups)
    assert trained(ours) == trained(theirs)
    assert len(trained(ours)) < len(list(ours.parameters()))


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_of_timm_inside_open_clip_the_projection_is_a_group(groups, arch):
    """open_clip always trains the projection of a timm tower and does not count it: one group less for the same."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "timm_pool": "", "image_size": 224}
    ours, theirs = (construct(arch("timm", vision=vision), where="x") for _ in range(2))
    lock(ours, {"image": groups + 1})
    theirs.lock_image_tower(unlocked_groups=groups)
    assert trained(ours) == trained(theirs)


def test_of_huggingface_the_projection_is_a_group(tmp_path, arch):
    """As with timm; names are those of open_clip's own tower."""
    source = str(tiny_hf.write_text_model(tmp_path, "roberta"))
    text = {"hf_model_name": source, "hf_model_pretrained": False, "hf_pooler_type": "mean_pooler"}
    text |= {"context_length": 12}
    model_cfg = {"embed_dim": 16, "vision_cfg": arch()["vision_cfg"], "text_cfg": text}
    ours, theirs = construct(model_cfg, where="student.arch"), CustomTextCLIP(**model_cfg)
    lock(ours, {"text": 2})
    theirs.lock_text_tower(unlocked_layers=1)
    assert trained(ours) == trained(theirs)
    assert "text.transformer.encoder.layer.1.output.dense.weight" in trained(ours)
    assert "text.transformer.encoder.layer.0.output.dense.weight" not in trained(ours)


@pytest.mark.parametrize(
    ("name", "groups", "first"),
    [
        ("resnet18", 1, "visual.fc.weight"),
        ("resnet18", 2, "visual.layer4.0.conv1.weight"),
        ("resnet18", 5, "visual.layer1.0.conv1.weight"),
        ("vit_b_32", 1, "visual.heads.head.weight"),
        ("vit_b_32", 2, "visual.encoder.layers.encoder_layer_11.ln_1.weight"),
        ("vit_b_32", 13, "visual.encoder.layers.encoder_layer_0.ln_1.weight"),
        ("convnext_tiny", 2, "visual.features.7.0.layer_scale"),
        ("regnet_y_400mf", 2, "visual.trunk_output.block4.block4-0.proj.0.weight"),
    ],
)
def test_groups_of_torchvision(name, groups, first):
    """The last groups of a single tower train, from `first` on; their order is that of the layers."""
    with init_empty_weights():
        clip = TwoTowers(build_torchvision(name, embed_dim=8, pretrained=False, where="student.image")[0], None)
    lock(clip, {"image": groups})
    names = [key for key, _ in clip.named_parameters() if key.startswith("visual.")]
    assert trained(clip) == set(names[names.index(first) :])


def test_groups_of_timm():
    """Of the tower that timm_towers builds: head, then the last block with the norm behind it."""
    tower, _ = build_timm("vit_tiny_patch16_224", embed_dim=8, pretrained=False, where="x", image_size=32)
    clip = TwoTowers(tower, None)
    lock(clip, {"image": 2})
    names = [key for key, _ in clip.named_parameters() if key.startswith("visual.")]
    assert trained(clip) == set(names[names.index("visual.trunk.blocks.11.norm1.weight") :])


def test_attention_pool_of_a_resnet_is_on_top(arch):
    """With its position embedding, though those of transformers lie at the bottom."""
    clip = construct(arch("resnet"), where="student.arch")
    lock(clip, {"image": 1})
    image = {name for name in trained(clip) if name.startswith("visual.")}
    assert image == {name for name, _ in clip.named_parameters() if "attnpool" in name}


@pytest.mark.parametrize("kind", ["resnet", "timm"])
def test_frozen_statistics_stay(kind, student, view, captions):
    """In the student's training mode; what trains above them goes on."""
    model = student(kind)
    said = lock(model.clip, {"image": 1, "text": 0})
    model.train()
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(view, model.contract.text.tokenize(captions))["image"].square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in model.clip.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved
    assert moved <= trained(model.clip)
    assert said[1] == "text tower"
    assert said[0].startswith("image tower but for its last 1 of ")


def test_more_groups_than_there_are(arch):
    clip = construct(arch("vit"), where="student.arch")
    with pytest.raises(ConfigError, match=r"student\.lock\.image=4: the image tower has 4 groups .* at most 3"):
        lock(clip, {"image": 4})
    tower, _ = build_torchvision("densenet121", embed_dim=8, pretrained=False, where="student.image")
    densenet = TwoTowers(tower, None)
    densenet.logit_scale = None  # as take_scale leaves it
    with pytest.raises(ConfigError, match=r"student\.lock\.image=1: the image tower has 1 group of layers"):
        lock(densenet, {"image": 1})
    with pytest.raises(ConfigError, match=r"student\.lock\.text: the student has no text tower"):
        lock(densenet, {"text": 0})
