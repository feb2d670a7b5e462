"""VisionTextDualEncoderModel from our files says what the student says, and what it cannot hold is refused."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_hf
import torch
from safetensors.torch import load_file

from kd_accel.export.dual_encoder import check_dual_encoder, write_dual_encoder
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig
from kd_accel.models.build import build_student
from kd_accel.models.image import to_model_input
from kd_accel.models.release import read_release, write_release
from kd_accel.models.towers import build_open_clip
from kd_accel.schema import ConfigError
from kd_accel.sections import StudentConfig

TEXTS = ["a red cat", "", "the dog on a green square !", "a photo of a cat on the " * 9]
FIRST_TOKEN = "cls_last_hidden_state_pooler"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family): a text model with weights, written once."""
    written = {}

    def of(family: str):
        if family not in written:
            written[family] = tiny_hf.write_text_model(tmp_path_factory.mktemp(family), family)
        return written[family]

    return of


def build(name, *, pooler: str = FIRST_TOKEN, proj: str | None = "linear", **vision):
    """(model, contract, model_cfg, scale) of a small ViT beside the text model."""
    text = {"hf_model_name": str(name), "hf_tokenizer_name": str(name), "hf_pooler_type": pooler, "hf_proj_type": proj}
    arch = tiny.arch(embed_dim=8 if proj else 32, **vision) | {"text_cfg": text | {"context_length": 12}}
    torch.manual_seed(6)
    model, *rest = build_open_clip(arch, pretrained=None, preprocess=None, name="student")
    return model.eval(), *rest


def written(folder, built):
    """transformers' model and processor of the files."""
    from transformers import VisionTextDualEncoderModel, VisionTextDualEncoderProcessor

    model, contract, model_cfg, scale = built
    values = {"state": model.state_dict(), "model_cfg": model_cfg, "contract": contract, "log_scale": scale.log_scale}
    write_release(folder, logit_bias=None, hf_text=model.text, **values)
    write_dual_encoder(folder, text=model.text, **values)
    theirs = VisionTextDualEncoderModel.from_pretrained(folder).eval()
    return theirs, VisionTextDualEncoderProcessor.from_pretrained(folder)


@torch.no_grad()
def compare(built, theirs, processor):
    """Unit features within 1e-5; texts of every length, as transformers cuts and pads them."""
    model, contract, _, scale = built
    pixels = to_model_input(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), contract.image, torch.float32)
    found = theirs(pixel_values=pixels, **processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt"))
    unit = torch.nn.functional.normalize
    image, text = unit(model.encode_image(pixels), dim=-1), unit(model.text(contract.text.tokenize(TEXTS)), dim=-1)
    torch.testing.assert_close(found.image_embeds, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.text_embeds, text, atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.logit_scale.item(), scale.log_scale)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pooler", [FIRST_TOKEN, "cls_pooler"])
@pytest.mark.parametrize("proj", ["linear", None])
def test_features_are_the_students(tmp_path, folder, family, pooler, proj):
    """The text model's own pooler, and the first token as it is; padding is token 0 or 1."""
    built = build(folder(family), pooler=pooler, proj=proj)
    compare(built, *written(tmp_path / "out", built))


def test_large_hidden_states_come_through_the_pooler(tmp_path, folder):
    """Tens, of which tanh itself would leave nothing but signs."""
    built = build(folder("bert"))
    with torch.no_grad():
        built[0].text.transformer.encoder.layer[-1].output.LayerNorm.weight.mul_(10)
        tokens = built[1].text.tokenize(TEXTS)
        assert built[0].text.transformer(tokens).last_hidden_state[:, 0].abs().max() > 20
    compare(built, *written(tmp_path / "out", built))


def test_weights_fit_in_half_precision(tmp_path, folder):
    """None of them is infinite there or zero, so that the model can be loaded in fp16."""
    built = build(folder("bert"))
    written(tmp_path / "out", built)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["text_model.pooler.dense.weight"].half().diagonal().min() > 0
    assert all(weight.half().isfinite().all() for weight in weights.values())


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("bert", {"pooler": "mean_pooler"}, "text_cfg.hf_pooler_type=mean_pooler"),
        ("bert", {"pooler": "last_pooler"}, "text_cfg.hf_pooler_type=last_pooler"),
        ("bert", {"proj": "mlp"}, "text_cfg.hf_proj_type=mlp"),
        ("distilbert", {}, "a distilbert text model, which makes no pooler_output"),
        ("mt5", {}, "a mt5 text model, which makes no pooler_output"),
        ("bert", {"pool_type": "avg"}, "vision_cfg.pool_type=avg"),
    ],
)
def test_what_has_no_place_in_it_is_named(folder, family, changes, said):
    """And what to do instead, in one line."""
    model, contract, model_cfg, _ = build(folder(family), **changes)
    with pytest.raises(ConfigError, match=f"^format=transformers: .* this model has {said}.*leave this format out.*$"):
        check_dual_encoder(model_cfg, contract, model.text)


def test_towers_that_were_distilled_apart(tmp_path, folder, releases):
    """student.pooling=cls makes an hf/ student that such a model can hold; what is exported can be exported again."""
    student = StudentConfig(arch=f"hf/{folder('bert')}", pooling="cls", embed_dim=8, context_length=12)
    model, contract, model_cfg, scale = build_student(student, teacher_width=None)
    assert model_cfg["text_cfg"]["hf_pooler_type"] == FIRST_TOKEN
    values = {"state": model.state_dict(), "model_cfg": model_cfg, "contract": contract}
    write_release(tmp_path / "text", log_scale=scale.log_scale, logit_bias=None, hf_text=model.text, **values)
    both = {"text_from": str(tmp_path / "text"), "format": "transformers"}
    run(ExportConfig(model=str(releases("image alone")), out=str(tmp_path / "out"), **both))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "vision-text-dual-encoder"
    run(ExportConfig(model=str(tmp_path / "out"), out=str(tmp_path / "again"), format="transformers"))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)
    run(ExportConfig(model=str(tmp_path / "out"), out=str(tmp_path / "plain")))
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "bert"
    assert read_release(tmp_path / "plain")[1].text.context_length == 12


@pytest.mark.parametrize(
    ("text_config", "said"),
    [
        ({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}, "cannot be had"),
        ({"model_type": "vit"}, "is a vit model, which is no text encoder"),
        ({"model_type": "bert", "vocab_size": 19}, "the tokenizer knows 15 tokens|not the model of"),
        ("bert", "cannot be had"),
    ],
)
def test_a_text_config_from_a_stranger(tmp_path, folder, text_config, said):
    """Refused in one line, and nothing of it is run."""
    written(tmp_path / "out", build(folder("bert")))
    trap = tmp_path / "trap"
    (tmp_path / "out" / "evil.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\n")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_config": text_config}))
    with pytest.raises(ConfigError, match=said) as error:
        read_release(tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not trap.exists()
