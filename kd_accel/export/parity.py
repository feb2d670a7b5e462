"""Whether what was written says what the student says: each format is loaded again and compared with it.

Pictures and texts are the same for every model. b of them, d embedding width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel.evals.onnx_encoder import open_onnx
from kd_accel.int8 import Int8Tower
from kd_accel.models.image import to_model_input
from kd_accel.models.model_cfg import is_open_clips
from kd_accel.models.release import read_release
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput, InputContract

TEXTS = ["a photo of a cat", "", "Two DOGS running on the beach, 12 %!", " ".join(["word"] * 40), "é 日本 🙂"]
BATCHES = (1, 2, 5)  # a graph may have learnt the size that it was traced with
LIMITS = {"open_clip": 0.0, "transformers": 1e-5, "onnx": 1e-4}  # of every number of a unit row
LIMITS["int8"] = 0.01  # of 1 - cosine of a picture: where a number lies between two integers, rounding may go both ways

EncodeImages = Callable[[Tensor], Tensor]  # uint8 [b, 3, h, w] -> raw [b, d]
EncodeTexts = Callable[[list[str]], Tensor]  # b texts -> raw [b, d]
Towers = tuple[EncodeImages | None, EncodeTexts | None]


@dataclass(frozen=True)
class Parity:
    """The largest difference of any number, for one format, of int8 the largest 1 - cosine; None: no such tower."""

    format: str
    image: float | None  # of unit features
    text: float | None  # of unit features
    cosine: float | None  # of every picture with every text


def check_all(
    directory: Path, formats: list[str], *, model: nn.Module, contract: InputContract, int8: Int8Tower | None
) -> list[Parity]:
    """`check` of every format; with `int8` image.onnx is compared with that tower. Raises ConfigError."""
    found = []
    for name in formats:
        compared = contract
        if name == "onnx" and int8 is not None:
            found.append(_check_int8(directory, int8, contract.image))
            compared = contract.only({"text"})
        if compared.image is not None or compared.text is not None:
            found.append(check(directory, name, model=model, contract=compared))
    return found


@torch.no_grad()
def check(directory: Path, format_: str, *, model: nn.Module, contract: InputContract) -> Parity:
    """Raises ConfigError for a format that differs by more than its limit: it would not be the student."""
    views = _views((64, 64) if contract.image is None else contract.image.size)
    ours, theirs = _of_model(model, contract), FORMATS[format_](directory, contract)
    worst: dict[str, float] = {}
    for count in BATCHES:
        one, other = (_features(towers, views[:count], TEXTS[:count]) for towers in (ours, theirs))
        for name in one:
            worst[name] = max(worst.get(name, 0.0), (one[name] - other[name]).abs().max().item())
    _check_limit(format_, max(worst.values()))
    return Parity(format_, *(worst.get(name) for name in ("image", "text", "cosine")))


@torch.no_grad()
def _check_int8(directory: Path, int8: Int8Tower, image: ImageInput) -> Parity:
    views, (encode_images, _) = _views(image.size), _onnx(directory, InputContract(image, None))
    worst = 0.0
    for count in BATCHES:
        ours, theirs = int8.tower(_pixels(views[:count], image)), encode_images(views[:count])
        worst = max(worst, (1 - F.cosine_similarity(ours, theirs)).max().item())
    _check_limit("int8", worst)
    return Parity("int8", worst, None, None)


def _check_limit(format_: str, largest: float) -> None:
    if largest > LIMITS[format_]:
        raise ConfigError(
            f"format={format_}: the files differ from the model by {largest:.2g}, more than {LIMITS[format_]:g}:"
            " nothing is released"
        )


def _views(size: tuple[int, int]) -> Tensor:  # uint8 [b, 3, h, w]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (max(BATCHES), 3, *size), dtype=torch.uint8, generator=generator)


def _features(towers: Towers, views: Tensor, texts: list[str]) -> dict[str, Tensor]:
    encode_images, encode_texts = towers
    found = {}
    if encode_images is not None:
        found["image"] = F.normalize(encode_images(views), dim=-1)
    if encode_texts is not None:
        found["text"] = F.normalize(encode_texts(texts), dim=-1)
    return found | ({"cosine": found["image"] @ found["text"].T} if len(found) == 2 else {})


def _of_model(model: nn.Module, contract: InputContract) -> Towers:
    image, text = contract.image, contract.text
    return (
        None if image is None else lambda views: model.encode_image(_pixels(views, image)),
        None if text is None else lambda texts: encode_text(model, text.tokenize(texts)),
    )


def _open_clip(directory: Path, contract: InputContract) -> Towers:
    """By open_clip itself, where it can read the release; else by us."""
    model, ours, model_cfg, _ = read_release(directory)
    if not is_open_clips(model_cfg):
        return _of_model(model, ours)
    theirs = open_clip.create_model(f"local-dir:{directory}", require_pretrained=True).eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{directory}")
    return lambda views: theirs.encode_image(_pixels(views, contract.image)), lambda t: theirs.encode_text(tokenize(t))


def _transformers(directory: Path, contract: InputContract) -> Towers:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)

    def encode_texts(texts: list[str]) -> Tensor:
        length = contract.text.context_length
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return model.get_text_features(**tokens).pooler_output

    return lambda views: model.get_image_features(_pixels(views, contract.image)).pooler_output, encode_texts


def _onnx(directory: Path, contract: InputContract) -> Towers:
    _, images, texts = open_onnx(directory, torch.device("cpu"))
    return images, texts


def _pixels(views: Tensor, image: ImageInput) -> Tensor:
    return to_model_input(views, image, torch.float32)


FORMATS = {"open_clip": _open_clip, "transformers": _transformers, "onnx": _onnx}
