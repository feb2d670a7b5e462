"""Texts whose embeddings were stored: the text tower of a model that has none of its own.

    StoredTexts.read(Path("text_embeddings.npy"), device)     # [n, d], with text_prompts.txt, one text per line
    StoredTexts.read(Path("classes.safetensors"), device)     # what kd-accel embed prompts=... wrote

b texts of a batch, n stored ones, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kd_accel.evals.sets import SetError
from kd_accel.models.class_embeddings import read_names
from kd_accel.schema import ConfigError

SUFFIXES = (".npy", ".safetensors")


@dataclass(frozen=True)
class StoredTexts:
    """A text's features are looked up by its exact words."""

    file: Path
    row_of: dict[str, int]  # text -> its row
    rows: Tensor  # [n, d] fp32, raw as they were stored

    @property
    def embed_dim(self) -> int:
        return self.rows.shape[1]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @cached_property
    def id(self) -> str:
        """SHA-256 of texts and embeddings."""
        found = hashlib.sha256(json.dumps(list(self.row_of.items())).encode())
        found.update(self.rows.cpu().numpy())
        return found.hexdigest()

    @classmethod
    def read(cls, file: Path, device: torch.device) -> StoredTexts:
        """Raises ConfigError for files that are missing or damaged, do not fit each other, or contradict themselves."""
        texts, rows = _read_safetensors(file) if file.suffix == ".safetensors" else _read_npy(file)
        if rows.ndim != 2 or len(rows) != len(texts):
            raise ConfigError(f"{file}: an array {list(rows.shape)} of {len(texts)} texts; needed is [{len(texts)}, d]")
        if len(broken := (~rows.isfinite()).any(1).nonzero()):
            raise ConfigError(f"{file}: the embedding of '{texts[broken[0]]}' is not finite")
        row_of = {text: row for row, text in reversed(list(enumerate(texts)))}  # of equal texts the first
        if odd := [text for text, row in zip(texts, rows, strict=True) if not rows[row_of[text]].equal(row)]:
            raise ConfigError(f"{file}: '{odd[0]}' is stored twice, with different embeddings")
        return cls(file, row_of, rows.to(device))

    def check(self, texts: list[str]) -> None:
        """Raises SetError unless all of `texts` are stored."""
        self._require(texts, "texts")

    def templates(self, class_names: tuple[str, ...], templates: tuple[str, ...]) -> tuple[str, ...]:
        """`templates` where every class name in each of them is stored, else none around the name.

        Raises SetError where some class names are not stored either.
        """
        if all(template.replace("{c}", name) in self.row_of for name in class_names for template in templates):
            return templates
        self._require(list(class_names), "class names")
        return ("{c}",)

    def __call__(self, texts: list[str]) -> Tensor:
        """b texts -> raw [b, d] fp32; raises SetError for a text that is not stored."""
        self.check(texts)
        return self.rows[[self.row_of[text] for text in texts]]

    def _require(self, texts: list[str], what: str) -> None:
        if missing := [text for text in texts if text not in self.row_of]:
            shown = ", ".join(f"'{text}'" for text in missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise SetError(
                f"text_from={self.file}: {len(missing)} of {len(texts)} {what} are not among its {len(self.row_of)}"
                f" texts: {shown}; store them too, or name a model with text_from"
            )


def prompt_files(file: Path) -> list[Path]:
    """Where the texts of an .npy may be: NAME.txt, and text_prompts.txt beside text_embeddings.npy."""
    before, found, behind = file.stem.rpartition("embeddings")
    return [file.with_suffix(".txt")] + ([file.with_name(f"{before}prompts{behind}.txt")] if found else [])


def _read_npy(file: Path) -> tuple[list[str], Tensor]:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    if not np.issubdtype(rows.dtype, np.floating):
        raise ConfigError(f"{file}: holds {rows.dtype}, not embeddings")
    looked_for = prompt_files(file)
    texts = next((path for path in looked_for if path.is_file()), None)
    if texts is None:
        raise ConfigError(
            f"{file}: its texts, one per line, are missing: looked for {' and '.join(map(str, looked_for))}"
        )
    return read_names(texts, str(file)), torch.from_numpy(rows).float()


def _read_safetensors(file: Path) -> tuple[list[str], Tensor]:
    try:
        with safe_open(file, framework="pt") as stored:
            names = (stored.metadata() or {}).get("names")
            if names is None or "embeddings" not in stored.keys():
                raise ConfigError(
                    f"{file}: expected the tensor 'embeddings' with names, as kd-accel embed prompts=... writes"
                )
            return json.loads(names), stored.get_tensor("embeddings").float()
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: truncated, or not safetensors: {error}") from None
