"""CLIPModel from our files says what the student says, and what it cannot hold is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image

from kd_accel.data.transforms import eval_view
from kd_accel.export.transformers_clip import check_plain_clip, write_transformers_clip
from kd_accel.models.image import to_model_input
from kd_accel.models.release import read_release
from kd_accel.schema import ConfigError

transformers = pytest.importorskip("transformers")


def written(folder, release, **changes):
    """(our model and contract, transformers' model and processor) of one release."""
    model, contract, model_cfg, scale = read_release(release)
    for file in release.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    values = {"state": model.state_dict(), "model_cfg": model_cfg, "contract": contract, "log_scale": scale.log_scale}
    write_transformers_clip(folder, **values | changes)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    return model, contract, theirs, transformers.CLIPProcessor.from_pretrained(folder)


@pytest.fixture
def release(tmp_path):
    return tiny.write_teacher(tmp_path / "release")


def test_features_and_logits_are_the_students(tmp_path, release):
    """On the same pixels and tokens, up to rounding; texts of every length, padded as transformers pads them."""
    folder = tmp_path / "both"
    folder.mkdir()
    ours, contract, theirs, processor = written(folder, release)
    texts = ["a cat", "", "two dogs running on the beach with a ball and a stick and more words than fit"]
    pixels = to_model_input(torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), contract.image, torch.float32)
    length = contract.text.context_length
    tokens = processor(text=texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        image, text = ours.encode_image(pixels), ours.encode_text(contract.text.tokenize(texts))
        found = theirs(pixel_values=pixels, **tokens)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(found.image_embeds, unit(image, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text_embeds, unit(text, dim=-1), atol=1e-5, rtol=0)
    logits = theirs.logit_scale.exp() * unit(image, dim=-1) @ unit(text, dim=-1).T
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-4, rtol=0)


def test_pictures_are_prepared_alike(tmp_path, release):
    """Size, crop, mean and deviation; the resamplers differ by a few of 255 steps."""
    folder = tmp_path / "both"
    folder.mkdir()
    _, contract, _, processor = written(folder, release)
    picture = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    ours = to_model_input(eval_view(picture, contract.image)[None], contract.image, torch.float32)
    theirs = processor(images=picture, return_tensors="pt")["pixel_values"]
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() < 3 / 255 / min(contract.image.std)


@pytest.mark.parametrize(
    ("tower", "change", "said"),
    [
        ("vision_cfg", {"layers": [1, 1, 1, 1]}, "a ResNet"),
        ("vision_cfg", {"timm_model_name": "resnet18"}, "vision_cfg.timm_model_name=resnet18"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type=avg"),
        ("text_cfg", {"hf_model_name": "bert"}, "text_cfg.hf_model_name=bert"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask=True"),
    ],
)
def test_what_has_no_place_in_it_is_named(release, tower, change, said):
    """And what to do instead."""
    _, contract, model_cfg, _ = read_release(release)
    with pytest.raises(ConfigError, match=f"this model has {said}.*leave this format out"):
        check_plain_clip(model_cfg | {tower: model_cfg[tower] | change}, contract)
