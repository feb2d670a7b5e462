"""Retrieval as pictures: a few queries of a set, both ways, with the best answers, for people to look at.

    RUN/examples/flickr_1k.json
    {"dataset", "step",
     "pictures": {row: {"jpeg": base64, "caption": its first one}},
     "image_retrieval": [{"query": caption, "wanted": row, "place": of the right picture, from 1,
                          "answers": [{"picture": row, "score": cosine, "right": bool}]}],
     "text_retrieval": [{"query": row, "place": of the best right caption, "answers": [{"caption", "score", "right"}]}]}

The report shows them. n images, m captions, d embedding width.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_accel.distributed import is_main
from kd_accel.evals.retrieval import UNIT, fixed_point
from kd_accel.text_files import replace_text

if TYPE_CHECKING:
    from kd_accel.evals.features import SetFeatures
    from kd_accel.evals.sets import EvalSet, Sample

ANSWERS = 5  # of each query
SIDE = 160  # pixels of a thumbnail's longer side
QUALITY = 80  # of its JPEG: about 6 kB for a photo
CHUNK_ROWS = 16384  # candidates in float64 at a time
CAPTION = 300  # characters of a caption that are kept


@dataclass(frozen=True)
class Gallery:
    """A whole set as the models see it."""

    images: Tensor  # [n, d] unit rows in fixed point, whose scores are those of the metrics to the last bit
    texts: Tensor  # [m, d] likewise
    owner: list[int]  # [m]: the image that a caption describes
    captions: list[str]  # [m]
    keys: list[str]  # [n]: the images' rows in the set


def write_examples(
    folder: Path,
    eval_set: EvalSet,
    samples: list[Sample],
    features: SetFeatures,
    texts: Tensor,
    owner: Tensor,
    captions: list[str],
    *,
    count: int,
    step: int | None,
) -> None:
    """Write `count` queries each way, evenly spaced over the set, to folder/examples/NAME.json; the main rank does.

    features.images [n, d] and texts [m, d], rows of any length; caption j, `captions[j]`, describes image owner[j] of
    the n that were readable. The file of a newer step stays. It grows by about 50 kB with every query, 7 thumbnails or
    fewer.
    """
    path = folder / "examples" / (re.sub(r"[^\w.-]+", "-", eval_set.name) + ".json")
    if not is_main() or not count or _is_newer(path, step):
        return
    gallery = Gallery(
        images=fixed_point(features.images),
        texts=fixed_point(texts.to(features.images.device)),
        owner=owner.tolist(),
        captions=[caption[:CAPTION] for caption in captions],
        keys=[str(row) for row in features.rows.tolist()],
    )
    by_text = [_images_for(text, gallery) for text in _spaced(len(gallery.texts), count)]
    by_image = [_texts_for(image, gallery) for image in _spaced(len(gallery.images), count)]
    pictures = {key: _picture(eval_set, samples[int(key)]) for key in _pictured(by_text, by_image)}
    found = {"pictures": pictures, "image_retrieval": by_text, "text_retrieval": by_image}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"dataset": eval_set.name, "step": step} | found) + "\n")


def _is_newer(path: Path, step: int | None) -> bool:
    """Whether the file is there and of a later step."""
    if step is None or not path.exists():
        return False
    there = json.loads(path.read_text(encoding="utf-8"))["step"]
    return there is not None and there > step


def _spaced(size: int, count: int) -> list[int]:
    """`count` of the numbers 0..size-1, from the first to the last, all of them where there are no more."""
    return torch.linspace(0, size - 1, min(count, size)).round().long().tolist()


def _images_for(text: int, gallery: Gallery) -> dict[str, Any]:
    """The best pictures for a caption."""
    wanted = gallery.owner[text]
    scores, order = _ranked(gallery.texts[text], gallery.images)
    answers = [
        {"picture": gallery.keys[image], "score": scores[image], "right": image == wanted} for image in order[:ANSWERS]
    ]
    place = order.index(wanted) + 1
    return {"query": gallery.captions[text], "wanted": gallery.keys[wanted], "place": place, "answers": answers}


def _texts_for(image: int, gallery: Gallery) -> dict[str, Any]:
    """The best captions for a picture."""
    scores, order = _ranked(gallery.images[image], gallery.texts)
    right = [gallery.owner[text] == image for text in order]
    answers = [
        {"caption": gallery.captions[text], "score": scores[text], "right": is_right}
        for text, is_right in zip(order[:ANSWERS], right, strict=False)
    ]
    return {"query": gallery.keys[image], "place": right.index(True) + 1, "answers": answers}


def _ranked(query: Tensor, candidates: Tensor) -> tuple[list[float], list[int]]:
    """The cosine of every candidate [m, d], and their order; of equal ones the first comes first."""
    scores = torch.cat([part.double() @ query.double() for part in candidates.split(CHUNK_ROWS)]) / UNIT**2
    return [round(score, 4) for score in scores.tolist()], scores.sort(descending=True, stable=True).indices.tolist()


def _pictured(by_text: list[dict], by_image: list[dict]) -> list[str]:
    """The keys of all pictures that the examples name."""
    keys = {example["query"] for example in by_image} | {example["wanted"] for example in by_text}
    return sorted(keys | {answer["picture"] for example in by_text for answer in example["answers"]}, key=int)


def _picture(eval_set: EvalSet, sample: Sample) -> dict[str, str]:
    """A small JPEG as base64, and what it shows."""
    image, file = eval_set.image(sample), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=QUALITY)
    return {"jpeg": base64.b64encode(file.getvalue()).decode("ascii"), "caption": sample.captions[0][:CAPTION]}
