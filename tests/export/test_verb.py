"""kd-accel export: what is written loads again, in every format, or nothing is written."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch

from kd_accel.cli import main
from kd_accel.evals.encoder import load_encoder
from kd_accel.export.parity import LIMITS
from kd_accel.export.verb import run
from kd_accel.export_config import ExportConfig
from kd_accel.models.release import read_release
from kd_accel.schema import ConfigError

EXTRA = ("onnx", "onnxscript", "onnxruntime")
VIEWS = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
TEXTS = ["a photo of a cat", "two dogs", ""]


@pytest.fixture
def onnx():
    for package in EXTRA:
        pytest.importorskip(package, reason='the extra "export" is not installed')


def features(model):
    encoder = load_encoder(model)
    return encoder.encode_images(VIEWS), encoder.encode_texts(TEXTS)


def test_one_folder_with_all_formats(tmp_path, releases, onnx, capsys):
    """open_clip, transformers and ONNX read their files, and the card names each difference."""
    out = tmp_path / "made" / "student"
    assert main(["export", str(releases("vit")), f"out={out}", "format=open_clip,transformers,onnx"]) == 0
    assert "open_clip: largest difference of unit features 0\n" in capsys.readouterr().out
    open_clip.create_model_and_transforms(f"local-dir:{out}", require_pretrained=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == "clip"
    card = (out / "README.md").read_text()
    assert card.count("| 0.0e+00 | 0.0e+00 | 0.0e+00 | 0 |") == 1
    assert "AutoModel.from_pretrained" in card
    assert "image.onnx" in card
    assert features(out)[0].equal(features(releases("vit"))[0])
    assert [path.name for path in out.parent.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("kind", "tower"),
    [
        ("timm alone", "image"),
        ("text alone", "text"),
    ],
)
def test_one_tower_as_onnx(tmp_path, releases, onnx, kind, tower):
    """Within 1e-4 of the model, which `run` checks at three batch sizes; evaluation reads it as an encoder."""
    run(ExportConfig(model=str(releases(kind)), out=str(tmp_path / "out"), format=["onnx"]))
    (file,) = (tmp_path / "out").glob("*.onnx")
    assert file.name == f"{tower}.onnx"
    given, encode = (VIEWS, "encode_images") if tower == "image" else (TEXTS, "encode_texts")
    ours, theirs = (getattr(load_encoder(path), encode)(given) for path in (releases(kind), file))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("image", "text"), [("vit", "text alone"), ("image alone", "vit"), ("timm alone", "hf text")])
def test_towers_of_two_models_become_one(tmp_path, releases, image, text):
    """Its features are those of the two; open_clip reads it where both are open_clip's."""
    out = tmp_path / "joined"
    run(ExportConfig(model=str(releases(image)), text_from=str(releases(text)), out=str(out)))
    ours = load_encoder(out)
    assert ours.encode_images(VIEWS).equal(load_encoder(releases(image)).encode_images(VIEWS))
    torch.testing.assert_close(ours.encode_texts(TEXTS), load_encoder(releases(text)).encode_texts(TEXTS))
    assert read_release(out)[3].log_scale == read_release(releases(text))[3].log_scale
    if image != "timm alone":
        open_clip.create_model(f"local-dir:{out}", require_pretrained=True)


def test_a_joined_vit_is_a_clip_of_transformers(tmp_path, releases):
    """Its text tower has another name in the state, and nothing else."""
    config = {"text_from": str(releases("text alone")), "format": "open_clip,transformers", "logit_scale": 50}
    run(ExportConfig(model=str(releases("image alone")), out=str(tmp_path / "out"), **config))
    from transformers import CLIPModel

    assert CLIPModel.from_pretrained(tmp_path / "out").logit_scale.exp().item() == pytest.approx(50)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": "resnet", "format": "transformers"}, "format=transformers: .* a ResNet"),
        ({"model": "hf text", "format": "transformers"}, "format=transformers: .*hf_pooler_type=mean_pooler: leave"),
        ({"model": "image alone", "format": "transformers"}, "format=transformers: .* one tower alone"),
        ({"model": "hf alone", "format": "transformers"}, "format=transformers: .* one tower alone"),
        ({"model": "vit", "text_from": "image alone"}, "text_from=.*: it has no text tower"),
        ({"model": "text alone", "text_from": "vit"}, "no image tower, so one is still missing: set image_from"),
        ({"model": "quick_gelu", "text_from": "vit"}, "QuickGELU"),
        ({"model": "vit", "text_from": "vit", "image_from": "vit"}, "they leave nothing of model"),
        ({"model": "nowhere"}, "nowhere: no such directory"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path, releases, values, said):
    """In one line, and no folder is left behind."""
    paths = {k: v if v == "nowhere" else str(releases(v)) for k, v in values.items() if k != "format"}
    rest = {"format": values["format"]} if "format" in values else {}
    with pytest.raises(ConfigError, match=said) as error:
        run(ExportConfig(out=str(tmp_path / "out"), **paths, **rest))
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path, releases):
    """Even an empty one."""
    with pytest.raises(ConfigError, match="is there already"):
        run(ExportConfig(model=str(releases("vit")), out=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_difference_releases_nothing(tmp_path, releases, monkeypatch):
    """As when an exporter rounds: here the limit is what no rounding meets."""
    monkeypatch.setitem(LIMITS, "transformers", -1)
    with pytest.raises(ConfigError, match="format=transformers: the files differ from the model by .*nothing"):
        run(ExportConfig(model=str(releases("vit")), out=str(tmp_path / "out"), format=["transformers"]))
    assert list(tmp_path.iterdir()) == []
