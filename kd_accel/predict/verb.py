"""kd-accel predict MODEL IMAGE [IMAGE ...] prompts=FILE: which of the texts, or classes, fits each picture, how well.

    kd-accel predict runs/student cat.jpg text=[a cat,a dog]
    kd-accel predict releases/student photos/ prompts=classes.txt html=out.html
    find . -name '*.jpg' | kd-accel predict exported/ - prompts=classes.txt json_lines=true
    kd-accel predict runs/classifier photos/

Probabilities are the softmax of logit_scale * cosine over the texts, as in zero-shot classification; without texts
those of the student's class head. b pictures, m texts or classes, d embedding width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_accel.data.folders import IMAGE_SUFFIXES
from kd_accel.data.source import BadSample
from kd_accel.data.transforms import decode, eval_view
from kd_accel.evals.encoder import Encoder, load_encoder
from kd_accel.models.class_embeddings import read_names
from kd_accel.predict.page import page
from kd_accel.predict_config import PredictConfig
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text


@dataclass(frozen=True)
class Guess:
    """One text, or class, for a picture."""

    index: int  # of the text or class, from 0
    text: str
    probability: float  # 0..1


@dataclass(frozen=True)
class Prediction:
    """The best texts for a picture, best first."""

    image: str  # its path
    guesses: list[Guess]


Probabilities = Callable[[Tensor], Tensor]  # raw image embeddings [b, d] -> [b, m]


def run(config: PredictConfig) -> None:
    """Print the predictions. Raises ConfigError, at the end, for pictures that cannot be read."""
    encoder = load_encoder(config.model, text_from=config.text_from)
    encoder.require("image")
    texts, probabilities = (_of_texts if config.text or config.prompts else _of_classes)(encoder, config)
    paths = list(_paths(config.images))
    found: list[Prediction] = []
    failed: list[str] = []
    for start in range(0, len(paths), config.batch_size):
        views, kept, bad = _read(paths[start : start + config.batch_size], encoder)
        failed += bad
        for path, row in zip(kept, probabilities(encoder.encode_images(views)).cpu(), strict=True):
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


def _of_texts(encoder: Encoder, config: PredictConfig) -> tuple[list[str], Probabilities]:
    texts = config.text or read_names(Path(config.prompts), "prompts")
    if not texts:
        raise ConfigError(f"prompts: {config.prompts} is empty; it needs a text per line")
    if encoder.text is None and encoder.class_head is not None:
        raise ConfigError(
            f"{config.model} has a class head and no text tower: leave the texts out, or name its classes: classes=FILE"
        )
    encoder.require("text")
    columns = encoder.unit(encoder.encode_texts([config.template.replace("{c}", text) for text in texts]))  # [m, d]
    return texts, lambda images: (config.logit_scale * encoder.unit(images) @ columns.T).softmax(dim=-1)


def _of_classes(encoder: Encoder, config: PredictConfig) -> tuple[list[str], Probabilities]:
    """The names of the classes, or their numbers where nobody knows the names."""
    head = encoder.class_head
    if head is None:
        raise ConfigError(
            f"{config.model} has no class head, so give either prompts=FILE or text=[...]: the texts to choose from"
        )
    count = len(head.bias)
    names = read_names(Path(config.classes), "classes") if config.classes else head.names
    if names is not None and len(names) != count:
        raise ConfigError(f"classes={config.classes}: {len(names)} names, but the class head knows {count} classes")
    return list(names or (f"class {number}" for number in range(count))), head.probabilities


def _best(probabilities: Tensor, texts: list[str], top_k: int) -> list[Guess]:
    """Of equal ones the first comes first."""
    order = probabilities.sort(descending=True, stable=True).indices[:top_k].tolist()
    return [Guess(index, texts[index], probabilities[index].item()) for index in order]
