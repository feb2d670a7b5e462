"""kd-accel predict MODEL IMAGE [IMAGE ...] prompts=FILE: which of the texts fits each picture, and how well.

    kd-accel predict runs/student cat.jpg text=[a cat,a dog]
    kd-accel predict releases/student photos/ prompts=classes.txt html=out.html
    find . -name '*.jpg' | kd-accel predict exported/ - prompts=classes.txt json_lines=true

Probabilities are the softmax of logit_scale * cosine over the texts, as in zero-shot classification. b pictures, m
texts, d embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_accel.data.folders import IMAGE_SUFFIXES
from kd_accel.data.source import BadSample
from kd_accel.data.transforms import decode, eval_view
from kd_accel.evals.encoder import Encoder, load_encoder
from kd_accel.metrics import replace_text
from kd_accel.models.class_embeddings import read_names
from kd_accel.predict.page import page
from kd_accel.predict_config import PredictConfig
from kd_accel.schema import ConfigError


@dataclass(frozen=True)
class Guess:
    """One text for a picture."""

    index: int  # of the text, from 0
    text: str
    probability: float  # 0..1


@dataclass(frozen=True)
class Prediction:
    """The best texts for a picture, best first."""

    image: str  # its path
    guesses: list[Guess]


def run(config: PredictConfig) -> None:
    """Print the predictions. Raises ConfigError, at the end, for pictures that cannot be read."""
    texts = config.text or read_names(Path(config.prompts), "prompts")
    encoder = load_encoder(config.model, text_from=config.text_from)
    encoder.require("image", "text")
    paths = list(_paths(config.images))
    columns = encoder.unit(encoder.encode_texts([config.template.replace("{c}", text) for text in texts]))
    found: list[Prediction] = []
    failed: list[str] = []
    for start in range(0, len(paths), config.batch_size):
        views, kept, bad = _read(paths[start : start + config.batch_size], encoder)
        failed += bad
        for path, row in zip(kept, _probabilities(encoder, views, columns, config.logit_scale), strict=True):
            prediction = Prediction(str(path), _best(row, texts, config.top_k))
            found.append(prediction)
            print(json.dumps(asdict(prediction)) if config.json_lines else in_words(prediction), flush=True)
    if config.html is not None:
        replace_text(Path(config.html), page(encoder.title, found))
        print(f"page: {config.html}", file=sys.stderr)
    if failed:
        raise ConfigError("\n".join(failed))


def in_words(prediction: Prediction) -> str:
    """The picture's path, and a line per text."""
    lines = (f"{100 * guess.probability:6.1f} %  {guess.text}" for guess in prediction.guesses)
    return "\n".join([prediction.image, *lines])


def _paths(words: list[str]) -> Iterator[Path]:
    """The pictures that are named, those of folders sorted. Raises ConfigError for what is neither."""
    for word in words:
        path = Path(word)
        if word == "-":
            yield from (Path(line.strip()) for line in sys.stdin if line.strip())
        elif path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise ConfigError(f"{path}: no picture in this folder ({', '.join(IMAGE_SUFFIXES)})")
            yield from inside
        else:
            yield path


def _read(paths: list[Path], encoder: Encoder) -> tuple[Tensor, list[Path], list[str]]:
    """(views [b, 3, h, w] uint8, their paths, a line for each picture that cannot be read)."""
    views, kept, bad = [torch.empty(0, 3, *encoder.image_input.size, dtype=torch.uint8)], [], []
    for path in paths:
        try:
            views.append(eval_view(decode(path.read_bytes()), encoder.image_input)[None])
            kept.append(path)
        except OSError as error:
            bad.append(f"{path}: cannot be read: {error.strerror}")
        except BadSample as error:
            bad.append(f"{path}: {error}")
    return torch.cat(views), kept, bad


def _probabilities(encoder: Encoder, views: Tensor, columns: Tensor, logit_scale: float) -> Tensor:  # [b, m]
    return (logit_scale * encoder.unit(encoder.encode_images(views)) @ columns.T).softmax(dim=-1).cpu()


def _best(probabilities: Tensor, texts: list[str], top_k: int) -> list[Guess]:
    """Of equal ones the first comes first."""
    order = probabilities.sort(descending=True, stable=True).indices[:top_k].tolist()
    return [Guess(index, texts[index], probabilities[index].item()) for index in order]
