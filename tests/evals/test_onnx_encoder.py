"""An exported model is evaluated like the one it was exported from; a folder that is not whole is one clear line."""

from __future__ import annotations

import builtins
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny_hf
import torch

from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.onnx_encoder import open_onnx
from kd_accel.models.onnx_meta import OnnxImage, OnnxMeta, OnnxText
from kd_accel.models.release import read_release
from kd_accel.schema import ConfigError

VIEWS = torch.randint(0, 256, (5, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a red cat", "", "Two DOGS " * 9]


class ImageTower(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model.encode_image(image)


class TextTower(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, text):
        return self.model.encode_text(text)


def export(tower, example: torch.Tensor, name: str, file: Path, *, fixed: bool = False) -> None:
    batch = {} if fixed else {"dynamic_shapes": {name: {0: torch.export.Dim("batch", min=1, max=1024)}}}
    torch.onnx.export(
        tower.eval(),
        (example,),
        file,
        dynamo=True,
        opset_version=18,
        input_names=[name],
        output_names=[f"{name}_features"],
        external_data=False,
        verify=False,
        verbose=False,
        **batch,
    )


@pytest.fixture(scope="module")
def exported(release, tmp_path_factory) -> Path:
    """The towers of `release` as ONNX files, with meta.json."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='the extra "export" is not installed')
    folder = tmp_path_factory.mktemp("onnx")
    model, contract, model_cfg, _ = read_release(release)
    export(ImageTower(model), torch.randn(2, 3, *contract.image.size), "image", folder / "image.onnx")
    tokens = contract.text.tokenize(["a", "b"])
    export(TextTower(model), tokens, "text", folder / "text.onnx")
    meta = OnnxMeta(
        name="exported",
        embed_dim=model_cfg["embed_dim"],
        logit_scale=100.0,
        image=OnnxImage(**asdict(contract.image)),
        text=OnnxText(context_length=contract.text.context_length, tokenizer="clip_bpe"),
    )
    (folder / "meta.json").write_text(meta.to_json())
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


def change(folder: Path, tower: str | None = None, **keys) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (meta[tower] if tower else meta).update(keys)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_features_are_those_of_the_model_it_was_exported_from(exported, release):
    """To rounding, for batches of any size, with views that are resized on the way; none are no features."""
    ours, reference = load_encoder(exported), load_encoder(release)
    assert (ours.name, ours.step, ours.home) == ("exported", None, exported)
    assert (ours.image_input, ours.embed_dim) == (reference.image_input, reference.embed_dim)
    for count in (0, 1, 5):
        torch.testing.assert_close(ours.encode_images(VIEWS[:count]), reference.encode_images(VIEWS[:count]))
    for count in (0, 1, 3):
        expected = reference.encode_texts(TEXTS[:count])
        torch.testing.assert_close(ours.encode_texts(TEXTS[:count]), expected, atol=1e-5, rtol=1e-4)


def test_one_file_is_one_tower(exported):
    image = load_encoder(exported / "image.onnx")
    assert (image.image is not None, image.text) == (True, None)
    both = load_encoder(image_from=str(exported), model=exported / "text.onnx")
    both.require("image", "text")


def test_a_release_with_onnx_files_beside_is_the_release(copy, release):
    shutil.copytree(release, copy, dirs_exist_ok=True)
    assert load_encoder(copy).image_id == load_encoder(release).image_id
    assert load_encoder(copy / "image.onnx").image_id != load_encoder(release).image_id


def test_a_folder_with_one_tower(copy):
    (copy / "text.onnx").unlink()
    change(copy, text=None)
    with pytest.raises(ConfigError, match=r"exported has no text tower: .*text_from=MODEL"):
        load_encoder(copy).require("text")


def test_a_tokenizer_of_transformers_lies_beside(copy):
    """Its tokens are those of the folder's files, at the length of meta.json."""
    tiny_hf.tokenizer().save_pretrained(copy)
    change(copy, "text", tokenizer="folder", options={"clean": "lower"})
    tokens = load_encoder(copy).text.wants.tokenize(["a RED cat"])
    assert tokens.shape == (1, 12)
    cls, a, red, cat, sep = 1, *(len(tiny_hf.SPECIAL) + tiny_hf.WORDS.index(word) for word in ("a", "red", "cat")), 2
    assert tokens[0, :6].tolist() == [cls, a, red, cat, sep, 0]


def test_ids_go_by_content(exported, copy):
    """Of the graph and of weights beside it, of preprocessing and tokenizer; not of the folder."""
    first, second = load_encoder(exported), load_encoder(copy)
    assert (first.image_id, first.text_id) == (second.image_id, second.text_id)
    change(copy, "image", resize_mode="squash")
    third = load_encoder(copy)
    assert third.image_id != first.image_id
    assert third.text_id == first.text_id
    (copy / "text.onnx.data").write_bytes(b"weights")
    assert load_encoder(copy).text_id != first.text_id


def _missing(folder):
    (folder / "text.onnx").unlink()


def _damaged(folder):
    (folder / "image.onnx").write_bytes(b"junk")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing, r"text\.onnx: no such file, though .*meta\.json names it"),
        (_damaged, r"image\.onnx: onnxruntime cannot load it: "),
        (lambda f: (f / "meta.json").unlink(), r"meta\.json: no such file"),
        (lambda f: (f / "meta.json").write_text("{"), r"meta\.json: cannot be read"),
        (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json: expected an object"),
        (lambda f: change(f, formt=1), r"meta\.json: formt: unknown key"),
        (lambda f: change(f, image=None, text=None), r"meta\.json: neither image nor text"),
        (
            lambda f: change(f, "image", input="pixels"),
            r"the graph is image -> image_features.* pixels -> image_features",
        ),
        (lambda f: change(f, embed_dim=7), r"image_features is 12 wide, but meta\.json says embed_dim=7"),
        (lambda f: change(f, "text", tokenizer="folder"), r"text\.tokenizer=folder cannot be had"),
        (lambda f: change(f, "text", options={"cleen": "lower"}), r"text\.tokenizer=clip_bpe cannot be had"),
        (
            lambda f: change(f, "image", file="text.onnx", input="text", output="text_features"),
            r"text is tensor\(int64\)",
        ),
    ],
)
def test_a_folder_that_is_not_whole(copy, damage, said):
    damage(copy)
    with pytest.raises(ConfigError, match=said):
        load_encoder(copy)


def test_a_graph_for_one_size_of_batch(copy, release):
    """A last batch is mostly smaller."""
    model, contract, *_ = read_release(release)
    export(ImageTower(model), torch.randn(2, 3, *contract.image.size), "image", copy / "image.onnx", fixed=True)
    with pytest.raises(ConfigError, match=r"image is tensor\(float\) \[2, 3, 32, 32\]; .* dynamic first dimension"):
        load_encoder(copy)


def test_without_onnxruntime_the_line_says_how_to_install_it(tmp_path, monkeypatch):
    image = OnnxImage(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bicubic", resize_mode="squash")
    (tmp_path / "meta.json").write_text(OnnxMeta(name="x", embed_dim=4, logit_scale=1, image=image).to_json())
    (tmp_path / "image.onnx").touch()
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "onnxruntime":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r'image\.onnx needs onnxruntime: pip install "kd-accel\[export\]"'):
        open_onnx(tmp_path, torch.device("cpu"))


def test_a_file_that_meta_json_does_not_name(copy):
    shutil.copy(copy / "image.onnx", copy / "other.onnx")
    with pytest.raises(ConfigError, match=r"other\.onnx: .*meta\.json names no such file"):
        load_encoder(copy / "other.onnx")
