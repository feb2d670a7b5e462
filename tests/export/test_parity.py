"""The files of a release in the hands of those they are for: every loader says what the student says.

On pictures of odd shapes and odd texts, whole ways: open_clip with its own preprocessing and tokens, to the bit;
transformers with its own tokens, within 1e-5; ONNX Runtime within 1e-4. What a format has no place for is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from kd_accel.data.transforms import eval_view
from kd_accel.evals.encoder import load_encoder
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig
from kd_accel.models.image import to_model_input
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import CONFIG
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError

WIDE = Image.linear_gradient("L").resize((301, 17))
TALL = Image.merge(
    "RGB", [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]
)
PICTURES = [WIDE, TALL.resize((23, 90)), TALL.resize((3, 5)), TALL.resize((32, 32)), Image.new("RGB", (70, 40), "red")]
TEXTS = [
    "a red cat",
    "",
    "!",
    "Don't PANIC, 42 % of dogs: é 日本 🙂",
    "the dog on a green square photo of " * 9 + "cat",
]
BATCHES = (1, 2, 5)
AS_CLIP = {"vit": "CLIPModel", "custom": "CLIPModel", "hf first token": "VisionTextDualEncoderModel"}
STUDENTS = [*AS_CLIP, "resnet", "hf text"]

pytest.importorskip("onnxscript", reason='the extra "export" is not installed')
onnxruntime = pytest.importorskip("onnxruntime", reason='the extra "export" is not installed')


@pytest.fixture(scope="module")
def exported(releases, tmp_path_factory):
    """A function: kind -> its release in every format that it is allowed, written once."""
    folder, found = tmp_path_factory.mktemp("exported"), {}

    def export(kind: str) -> Path:
        if kind not in found:
            found[kind] = folder / kind.replace(" ", "_")
            formats = ["open_clip", "onnx"] + (["transformers"] if kind in AS_CLIP else [])
            run(ExportConfig(model=str(releases(kind)), out=str(found[kind]), format=formats))
        return found[kind]

    return export


@pytest.fixture(scope="module")
def said(releases):
    """A function: kind -> pixels, raw image and text features and logit_scale of the student itself."""

    @torch.no_grad()
    def features(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        model, contract, _, scale = read_release(releases(kind))
        views = torch.stack([eval_view(picture.convert("RGB"), contract.image) for picture in PICTURES])
        pixels = to_model_input(views, contract.image, torch.float32)
        text = encode_text(model, contract.text.tokenize(TEXTS))
        return pixels, model.encode_image(pixels), text, torch.tensor(scale.log_scale).exp()

    return features


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


@torch.no_grad()
@pytest.mark.parametrize("kind", STUDENTS)
def test_open_clip_to_the_bit(exported, said, kind):
    """From pictures and texts on; a tower of HuggingFace needs the line that hf_text.py tells."""
    folder, tower = exported(kind), {}
    text_cfg = json.loads((folder / CONFIG).read_text())["model_cfg"]["text_cfg"]
    if "hf_model_name" in text_cfg:
        where = folder / "text" if kind in AS_CLIP else folder
        tower = {"text_cfg": text_cfg | {"hf_model_name": str(where), "hf_model_pretrained": False}}
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", require_pretrained=True, **tower
    )
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    _, image, text, scale = said(kind)
    model.eval()
    assert model.encode_image(torch.stack([preprocess(picture) for picture in PICTURES])).equal(image)
    assert model.encode_text(tokens).equal(text)
    assert model.logit_scale.exp().equal(scale)


@torch.no_grad()
@pytest.mark.parametrize("kind", AS_CLIP)
def test_transformers_within_1e_5(exported, said, kind):
    """Unit features, and the logits at a scale that makes them a hundred times larger or less."""
    from transformers import AutoModel, AutoProcessor

    model, processor = AutoModel.from_pretrained(exported(kind)).eval(), AutoProcessor.from_pretrained(exported(kind))
    assert type(model).__name__ == AS_CLIP[kind]
    pixels, image, text, scale = said(kind)
    tokens = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    found = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(found.image_embeds, unit(image), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text_embeds, unit(text), atol=1e-5, rtol=0)
    logits = scale * unit(image) @ unit(text).T
    torch.testing.assert_close(found.logits_per_image, logits, atol=1e-5 * scale.item(), rtol=0)


@pytest.mark.parametrize("kind", STUDENTS)
def test_onnx_within_1e_4(exported, said, kind):
    """ONNX Runtime alone, at three batch sizes; names and scale from meta.json."""
    meta = json.loads((exported(kind) / "meta.json").read_text())
    pixels, image, text, scale = said(kind)
    tokens = read_release(exported(kind))[1].text.tokenize(TEXTS)
    for tower, given, expected in (("image", pixels, image), ("text", tokens, text)):
        session = onnxruntime.InferenceSession(exported(kind) / meta[tower]["file"])
        for count in BATCHES:
            (rows,) = session.run([meta[tower]["output"]], {meta[tower]["input"]: given[:count].numpy()})
            torch.testing.assert_close(unit(torch.from_numpy(rows)), unit(expected[:count]), atol=1e-4, rtol=0)
    assert meta["logit_scale"] == pytest.approx(scale.item(), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(set(STUDENTS) - set(AS_CLIP)))
def test_the_others_are_no_model_of_transformers(releases, tmp_path, kind):
    with pytest.raises(ConfigError, match="^format=transformers: .* leave this format out"):
        run(ExportConfig(model=str(releases(kind)), out=str(tmp_path / "out"), format=["transformers"]))
    assert not (tmp_path / "out").exists()


def test_kd_accel_reads_what_it_exported(exported, releases):
    """Of the folder whose config.json is that of transformers' two towers."""
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    ours, source = load_encoder(exported("hf first token")), load_encoder(releases("hf first token"))
    assert ours.encode_images(views).equal(source.encode_images(views))
    assert ours.encode_texts(TEXTS).equal(source.encode_texts(TEXTS))
