"""What a student has on top of its towers, and its masked view."""

from __future__ import annotations

import pytest
import torch

from kd_accel.models.patch_mask import PatchMask
from kd_accel.models.student import Student
from kd_accel.schema import ConfigError

HEADS = {"projector": "mlp", "num_classes": 5, "prototype_head": {"hidden": 20, "width": 7, "layers": 2}}


def features(model: Student, view, captions) -> dict[str, torch.Tensor]:
    return model(view, model.contract.text.tokenize(captions))


def test_widths_are_those_of_the_features(student, view, captions):
    """What the objective is told before the first batch is what comes out."""
    model = student(teacher_dim=24, mask_ratio=0.75, **HEADS)
    out = features(model, view, captions)
    assert {name: rows.shape[1] for name, rows in out.items()} == model.widths
    assert {"masked_image", "projected_masked_image", "class_logits", "prototype_text"} < out.keys()


def test_heads_see_the_raw_embeddings(student, view, captions):
    model = student(teacher_dim=24, **HEADS)
    out = features(model, view, captions)
    torch.testing.assert_close(out["class_logits"], model.class_head(out["image"]))
    torch.testing.assert_close(out["prototype_text"], model.prototype_head["text"](out["text"]))
    torch.testing.assert_close(out["projected_image"], model.projector["image"](out["image"]))


def test_heads_leave_the_towers_initial_weights_alone(student):
    """Runs with and without heads start from the same towers."""
    plain, headed = student(), student(teacher_dim=24, **HEADS)
    torch.testing.assert_close(plain.clip.state_dict(), headed.clip.state_dict(), rtol=0, atol=0)


def test_no_head_is_released(student):
    model = student(teacher_dim=24, mask_ratio=0.5, **HEADS)
    assert model.release_state(model.state_dict()).keys() == student().clip.state_dict().keys()


def test_every_parameter_gets_a_gradient(student, view, captions):
    """A parameter that no loss reaches would stop DDP."""
    model = student(teacher_dim=24, mask_ratio=0.5, **HEADS)
    sum(rows.square().sum() for rows in features(model, view, captions).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_projector_leads_to_one_width(student, arch):
    from kd_accel.sections import StudentConfig

    with pytest.raises(ConfigError, match="leads to one width, but the teachers have several: large 24, base 12"):
        Student(StudentConfig(arch=arch(), projector="linear"), {"large": 24, "base": 12})


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 1 / 4), (0.5, 1 / 2), (0.99, None)])
def test_masked_view_keeps_a_share_of_the_patches(student, view, captions, ratio, kept):
    """Another one for every sample; at least one stays, and the class token."""
    model = student(mask_ratio=ratio)
    seen = []
    model.clip.visual.transformer.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    features(model, view, captions)
    whole, masked = seen
    assert masked - 1 == (max(1, int((whole - 1) * kept)) if kept else 1)


def test_masked_view_changes_nothing_else(student, view, captions):
    """The ordinary features are those of a student without one; the masked ones are not."""
    plain, masking = features(student(), view, captions), features(student(mask_ratio=0.5), view, captions)
    torch.testing.assert_close({name: masking[name] for name in plain}, plain)
    assert not torch.allclose(masking["masked_image"], masking["image"])


def test_in_eval_mode_nothing_is_masked(student, view, captions):
    """The key is there all the same, as an episode's pass expects."""
    out = features(student(mask_ratio=0.5).eval(), view, captions)
    torch.testing.assert_close(out["masked_image"], out["image"])


def test_masks_are_drawn_anew_for_every_sample_and_pass(student, view, captions):
    """Equal images get different patches."""
    model = student(mask_ratio=0.5)
    same = view[:1].expand(3, -1, -1, -1)
    first, second = (features(model, same, captions)["masked_image"] for _ in range(2))
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, second)


def test_timm_transformers_have_patches_too(view):
    """A timm ViT drops them in its trunk."""
    import timm

    holder = torch.nn.Module()
    holder.trunk = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).train()
    mask = PatchMask.install(holder, 0.5)
    seen = []
    holder.trunk.blocks.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    image = torch.randn(2, 3, 32, 32)
    holder.trunk(image)
    with mask:
        holder.trunk(image)
    assert seen == [5, 3]  # a class token with 4 patches, then with 2


def test_towers_without_patches_are_refused(student):
    with pytest.raises(ConfigError, match="masked_feature_mse needs an image tower with patches"):
        student("resnet", mask_ratio=0.5)


@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [
        ({}, 1),
        ({"reg_tokens": 4}, 5),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, 2),
    ],
)
@pytest.mark.parametrize("ratio", [0.75, 0.99])
def test_only_patches_are_dropped(tokens, prefix, ratio):
    """Class token and registers stay in front; each sample keeps its own patches, none twice, at least one of 16."""
    from timm.models.vision_transformer import VisionTransformer

    holder = torch.nn.Module()
    holder.trunk = VisionTransformer(img_size=32, patch_size=8, embed_dim=8, depth=1, num_heads=2, **tokens)
    mask = PatchMask.install(holder, ratio)
    numbered = torch.arange(prefix + 16).float().view(1, -1, 1).expand(5, -1, 1)  # every token its own place
    with mask:
        kept = mask(numbered)[..., 0].long()
    assert kept[:, :prefix].tolist() == [list(range(prefix))] * 5
    patches = [sorted(row) for row in kept[:, prefix:].tolist()]
    assert {len(set(row)) for row in patches} == {max(1, int(16 * (1 - ratio)))}
    assert min(row[0] for row in patches) >= prefix
    assert len({tuple(row) for row in patches}) > 1


def test_a_tower_that_drops_patches_in_another_way_is_refused(student, arch):
    """timm's Eva has an empty place for a dropout that also gives indices back."""
    eva = {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "", "timm_proj": "linear"}
    with pytest.raises(ConfigError, match=r"student\.arch: masked_feature_mse needs an image tower with patches"):
        student(arch={**arch(), "vision_cfg": eva}, mask_ratio=0.75)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_a_projector_of_ones_own(student, view, captions, norm):
    """Linear, norm, ReLU, as often as said, and a linear layer; 0 layers are that one alone (ProtoCLIP's rule)."""
    kinds = {"layer": torch.nn.LayerNorm, "batch": torch.nn.BatchNorm1d, "none": torch.nn.Identity}
    model = student(teacher_dim=24, projector={"layers": 2, "hidden": 20, "norm": norm})
    made = [type(layer) for layer in model.projector["image"]]
    assert made == [torch.nn.Linear, kinds[norm], torch.nn.ReLU] * 2 + [torch.nn.Linear]
    assert features(model, view, captions)["projected_text"].shape[1] == 24
    assert len(student(teacher_dim=24, projector={"layers": 0}).projector["image"]) == 1
