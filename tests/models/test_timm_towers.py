"""Image towers from timm: features with a head and without, what a model wants to see, the size of its images."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate import init_empty_weights

from kd_accel.models.timm_towers import build_timm
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

FAMILIES = """
resnet18 resnet50.a1_in1k mobilenetv3_small_100 efficientnet_b0 vit_small_patch16_224 convnext_tiny
swin_tiny_patch4_window7_224 fastvit_t8 ghostnet_100 densenet121 regnety_004 vgg11 levit_128 cait_xxs24_224
deit_tiny_distilled_patch16_224 beit_base_patch16_224 inception_v3 mixer_s16_224
""".split()


def build(name: str, embed_dim: int | None = None, *, pretrained: bool = False, image_size: int | None = None):
    where = "student.image"
    return build_timm(name, embed_dim=embed_dim, pretrained=pretrained, where=where, image_size=image_size)


@pytest.mark.parametrize("embed_dim", [None, 300])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_builds(name, embed_dim):
    """Pixels of the size that it asks for become rows as wide as it says; shapes alone, without weights."""
    with init_empty_weights():
        tower, wants = build(name, embed_dim)
    tower.to("meta").eval()
    assert tower(torch.empty(2, 3, *wants.size, device="meta")).shape == (2, tower.embed_dim)
    assert tower.embed_dim == embed_dim or embed_dim is None
    assert wants.size == (tower.image_size, tower.image_size)


@pytest.mark.parametrize("embed_dim", [None, 16])
def test_features_are_timms_own(embed_dim):
    """The outputs of a classifier of that many classes, or what it reads."""
    tower, wants = build("mobilenetv3_small_100", embed_dim)
    theirs = timm.create_model("mobilenetv3_small_100", num_classes=16)
    theirs.load_state_dict(tower.trunk.state_dict(), strict=embed_dim is not None)
    pixels = torch.randn(2, 3, *wants.size)
    body = theirs.eval().forward_features(pixels)
    torch.testing.assert_close(tower.eval()(pixels), theirs.forward_head(body, pre_logits=embed_dim is None))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "resnet18.a1_in1k",
            ImageInput((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", "shortest"),
        ),
        ("mobilenetv1_100", ImageInput((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "shortest")),
        (
            "tf_efficientnetv2_b3",
            ImageInput((240, 240), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic", "squash"),
        ),
    ],
)
def test_wants_what_its_weights_say(name, wanted):
    """Values of timm's model cards."""
    with init_empty_weights():
        assert build(name)[1] == wanted


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_another_image_size(name):
    """Of a CNN, and of models that are built for one size; the tower trains afterwards."""
    tower, wants = build(name, 16, image_size=64)
    assert wants.size == (64, 64)
    assert tower.image_size == 64
    assert all(module.training for module in tower.modules())
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 16)


def test_a_size_that_the_model_cannot_take():
    with pytest.raises(ConfigError, match=r"^student\.image: efficientformer_l1 cannot take images of 64 pixels: "):
        build("efficientformer_l1", 16, image_size=64)


def test_gradient_checkpointing_changes_no_gradient():
    tower, _ = build("vit_tiny_patch16_224", 16, image_size=32)
    pixels = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        assert tower.trunk.grad_checkpointing is enable
        gradients.append(torch.autograd.grad(tower(pixels).square().sum(), list(tower.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_unknown_names_are_hinted_at():
    with pytest.raises(ConfigError, match=r"^student\.image: timm has no model 'resnet_18'; did you mean .*resnet18"):
        build("resnet_18")
    with pytest.raises(ConfigError, match=r"student\.image: timm cannot build resnet18\.nope: Invalid .*tag \(nope\)"):
        build("resnet18.nope")


def test_pretrained_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"^student\.image: timm cannot build resnet18\.a2_in1k: .*fix the net") as e:
        build("resnet18.a2_in1k", pretrained=True)
    assert "\n" not in str(e.value)
