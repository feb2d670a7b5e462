"""CLIP and SigLIP of transformers: the features, logits and inputs of the checkpoint."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
import tiny_hf
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from kd_accel.models.hf_clip import build_hf_clip, is_hf_clip
from kd_accel.models.image import to_model_input
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError
from kd_accel.trim import trimmed

CAPTIONS = ["a red cat", "the dog on a green square !", "", "photo of " * 20]
WHERE = "teacher.hf"
# The second is how OpenAI's first checkpoints name their end of text: 2, which is none of their tokens for it.
KINDS = {"clip": ("clip", tiny_hf.END), "clip, eos 2": ("clip", 2), "siglip": ("siglip", tiny_hf.END)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(kind): written once."""
    written = {}

    def of(kind: str):
        if kind not in written:
            family, eos = KINDS[kind]
            written[kind] = tiny_hf.write_clip(tmp_path_factory.mktemp("clip"), family, eos=eos)
        return written[kind]

    return of


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_and_logits_of_the_checkpoint(kind, folder, view):
    """With the tokenizer and the processor that lie beside the weights."""
    theirs = AutoModel.from_pretrained(folder(kind)).eval()
    inputs = AutoTokenizer.from_pretrained(folder(kind))(
        CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    pictures = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in view]
    pixels = AutoImageProcessor.from_pretrained(folder(kind))(pictures, return_tensors="pt").pixel_values
    mask = {} if kind == "siglip" else {"attention_mask": inputs.attention_mask}  # SigLIP was trained without
    expected = theirs(input_ids=inputs.input_ids, pixel_values=pixels, **mask)

    model, contract, embed_dim, scale = build_hf_clip(str(folder(kind)), where=WHERE)
    own_pixels = to_model_input(view, contract.image, torch.float32)
    torch.testing.assert_close(own_pixels, pixels, rtol=0, atol=1e-5)
    image, text = model.encode_image(own_pixels), model.encode_text(contract.text.tokenize(CAPTIONS))
    assert image.shape == (3, embed_dim)
    raw = theirs.get_image_features(pixels), theirs.get_text_features(inputs.input_ids, **mask)
    torch.testing.assert_close((image, text), tuple(r.pooler_output for r in raw), rtol=1e-5, atol=1e-5)
    image, text = model.encode_image(own_pixels, normalize=True), model.encode_text(inputs.input_ids, normalize=True)
    torch.testing.assert_close((image, text), (expected.image_embeds, expected.text_embeds), rtol=1e-5, atol=1e-5)
    logits = torch.tensor(scale.log_scale).exp() * image @ text.T + (scale.bias or 0)
    torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5)
    assert (scale.bias is None) == (kind != "siglip")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_is_cut_where_nobody_reads_it(kind, folder):
    model, contract, _, _ = build_hf_clip(str(folder(kind)), where=WHERE)
    tokens = contract.text.tokenize(CAPTIONS[:3])
    short = trimmed(tokens, contract.text.pad, multiple=1)
    assert (tokens.shape[1], short.shape[1]) == (12, 12 if kind == "siglip" else 9)
    torch.testing.assert_close(encode_text(model, short), encode_text(model, tokens), rtol=1e-5, atol=1e-6)
    differ = (model.encode_text(tokens)[:1] - model.encode_text(tokens)[1:]).norm(dim=1)
    assert (differ > 1e-3).all()  # or equality would say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_wants_as_input(kind, folder):
    _, contract, _, _ = build_hf_clip(str(folder(kind)), where=WHERE)
    image, text = contract.image, contract.text
    assert (image.size, image.interpolation) == ((32, 32), "bicubic")
    assert image.resize_mode == ("squash" if kind == "siglip" else "shortest")
    assert (text.context_length, text.pad) == (12, None if kind == "siglip" else 0)
    tokens = pickle.loads(pickle.dumps(text.tokenize))(CAPTIONS)
    assert torch.equal(tokens, text.tokenize(CAPTIONS))
    assert (tokens.shape, tokens.dtype) == ((4, 12), torch.int64)


def test_pixels_as_the_processor_says(tmp_path, view):
    """Filter, mean and std are read; a picture of another shape keeps its sides' ratio, or not."""
    given = {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    folder = tiny_hf.write_clip(tmp_path, "siglip", **given)
    model, contract, _, _ = build_hf_clip(str(folder), where=WHERE)
    image = contract.image
    assert (image.interpolation, image.mean, image.std) == ("bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(folder)(wide, return_tensors="pt").pixel_values
    pixels = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[None]
    got = to_model_input(pixels, image, torch.float32)
    one_level = 1 / 255 / min(image.std)  # the processor rounds to whole levels after resizing
    torch.testing.assert_close(got, expected, rtol=0, atol=1.01 * one_level)


def test_no_parameter_that_the_engine_cannot_prepare(folder):
    """DeepSpeed 0.19.8 stumbles over 0-dim ones."""
    for kind in KINDS:
        model, _, _, _ = build_hf_clip(str(folder(kind)), where=WHERE)
        assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"visual", "text"}
        assert all(p.ndim > 0 and p.is_contiguous() and p.dtype == torch.float32 for p in model.parameters())


def test_what_has_two_towers(folder, tmp_path):
    assert all(is_hf_clip(str(folder(kind)), where=WHERE) for kind in KINDS)
    assert not is_hf_clip(str(tiny_hf.write_text_model(tmp_path)), where=WHERE)


def change(folder, file: str, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def refused(folder) -> str:
    with pytest.raises(ConfigError, match=f"^{WHERE}: ") as raised:
        build_hf_clip(str(folder), where=WHERE)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_mistakes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "'org/none' cannot be had: fix the name or the network, or name a folder" in refused("org/none")
    assert "is a bert model; clip and siglip are supported" in refused(tiny_hf.write_text_model(tmp_path / "bert"))

    def copy(name):
        return shutil.copytree(folder("clip"), tmp_path / name)

    resized = copy("resized")
    change(resized, "preprocessor_config.json", size={"shortest_edge": 40})
    assert "resizes to {'shortest_edge': 40} and crops to {'height': 32, 'width': 32}: let" in refused(resized)
    lanczos = copy("lanczos")
    change(lanczos, "preprocessor_config.json", resample=1)
    assert "bicubic or bilinear is needed" in refused(lanczos)
    for file, what in (("preprocessor_config.json", "image processor"), ("model.safetensors", "model")):
        bare = copy(f"without {what}")
        (bare / file).unlink()
        assert f"the {what} of '{bare}' cannot be had" in refused(bare)
    deeper = copy("deeper")
    content = json.loads((deeper / "config.json").read_text())
    change(deeper, "config.json", text_config=content["text_config"] | {"num_hidden_layers": 3})
    assert "lack text_model.encoder.layers.2." in refused(deeper)
