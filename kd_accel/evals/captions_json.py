"""Retrieval sets as one json file of captions beside the images, read where they lie.

COCO   {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}, in annotations/captions_NAME.json,
       the images in NAME/ beside annotations/
ALBEF  [{"image": PATH, "caption": TEXT or [TEXT, ...]}, ...], paths relative to the file's folder, the one above, or
       images/ in one of them; objects of one image are one sample
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_accel.data.annotations import coco_images
from kd_accel.evals.class_texts import read_json
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.schema import ConfigError

# what the json of a test split is called in the folder of its set, the first that is there counts
FILES = (
    "annotations/captions_val2017.json",
    "annotations/captions_val2014.json",
    "coco_karpathy_test.json",
    "flickr30k_test.json",
)


@dataclass(frozen=True)
class CaptionsSet(EvalSet):
    """The images that a json file lists, with all captions of each."""

    file: Path | None = None  # the json

    def samples(self) -> list[Sample]:
        """In the file's order. Raises ConfigError for a file of neither layout, an image without caption, no image,
        and when the images are not where the layout has them."""
        content = read_json(self.file)
        try:
            captions = _coco(content) if isinstance(content, dict) else _albef(content)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f'{self.file} is neither {{"images": [...], "annotations": [...]}} (COCO) nor a list of {{"image", '
                f'"caption"}} (ALBEF): {type(error).__name__}: {error}'
            ) from None
        if not captions:
            raise ConfigError(f"{self.file}: lists no image")
        if bare := [image for image, texts in captions.items() if not texts]:
            raise ConfigError(f"{self.file}: {bare[0]} has no caption")
        root = _image_root(self.file, list(captions))
        return [Sample(image, root / image, captions=tuple(texts)) for image, texts in captions.items()]


def open_captions(path: Path, *, name: str | None = None, split: str = "test") -> CaptionsSet | None:
    """The set in a folder that has one of FILES, or in a json file itself; None where `path` bears no sign of one.

    There is no training split: retrieval has no linear probe.
    """
    if split != "test":
        return None
    files = [path] if path.suffix == ".json" else [path / file for file in FILES]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        return None
    return CaptionsSet(name or (path.stem if path == found else path.resolve().name), path, "retrieval", file=found)


def _coco(content: dict) -> dict[str, list[str]]:
    """{file name: its captions}."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in content["annotations"]:
        captions[names[annotation["image_id"]]] += _texts(annotation["caption"])
    return captions


def _albef(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row["image"], []).extend(_texts(row["caption"]))
    return captions


def _texts(value: Any) -> list[str]:
    """One text or several, stripped, without empty ones."""
    texts = [value] if isinstance(value, str) else value
    return [text.strip() for text in texts if text.strip()]


def _image_root(path: Path, images: list[str]) -> Path:
    """The folder that the images' paths start from: the first that holds any of the first hundred."""
    above = (path.absolute().parent, path.absolute().parent.parent)
    roots = [*filter(None, [coco_images(path)]), *above, *(folder / "images" for folder in above)]
    for root in roots:
        if any((root / image).is_file() for image in images[:100]):
            return root
    raise ConfigError(f"{path}: its images, {images[0]} first, are in none of {', '.join(map(str, roots))}")
