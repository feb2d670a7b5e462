"""kd-accel eval prepare SOURCE out=FOLDER task=TASK: a HuggingFace dataset as an evaluation set in tars.

    kd-accel eval prepare flickr_1k/TEST/test out=sets/wds_flickr30k_test task=retrieval
    kd-accel eval prepare hf_cache/nlphuji___winogavil out=sets/winogavil task=winogavil

The layout is CLIP_benchmark's: KEY.jpg with the source's own bytes, and KEY.cls or KEY.txt with a caption per line. An
image that nobody can decode is kept: leaving it out would make the set another one, and `eval` counts it as unreadable.

WinoGAViL (columns cue, candidates, candidate_images, associations of nlphuji/winogavil) stores each picture once, as
KEY.jpg with its name in KEY.txt, and beside test/ a file questions.jsonl with a question per line:
{"cue": "pogonophile", "candidates": [KEY, ...], "associations": [KEY, ...]}

Tars are written into .SPLIT.part/, which gets its name when all of them are there. A killed run leaves no set behind,
and the next run goes on with its tars.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm
from webdataset import TarWriter

from kd_accel.data.decoding import FORMATS
from kd_accel.data.resize import EXTENSIONS
from kd_accel.evals.class_texts import CLASS_NAMES, TEMPLATES, read_lines
from kd_accel.evals.prepare_sources import column, image_bytes, open_rows, require_column, value
from kd_accel.evals.prompts import SIMPLE
from kd_accel.evals.winogavil_set import QUESTIONS
from kd_accel.prepare_config import PrepareConfig
from kd_accel.schema import ConfigError
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing

SETTINGS = "prepare.json"  # what the tars of an unfinished split were begun with


@dataclass(frozen=True)
class _Plan:
    """The set that is to be written."""

    texts: dict[str, str]  # files beside the split's folder -> content
    truths: list[dict[str, bytes]]  # [n] members of each sample beside its image: extension -> content
    image: Callable[[int], bytes]  # row -> its encoded image


def run(config: PrepareConfig) -> None:
    """Write the set; raises ConfigError for a source that cannot be one, and where there is one already."""
    out = Path(config.out)
    if (out / config.into).exists():
        raise ConfigError(f"out={out}: holds {config.into}/ already: choose another folder, or delete that one")
    rows = open_rows(config.source, config.split)
    plan = {"zero_shot": _zero_shot, "retrieval": _retrieval, "winogavil": _winogavil}[config.task](rows, config)
    if not plan.truths:
        raise ConfigError(f"source={config.source}: has no rows")
    try:
        _write(plan, out, config)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror or error}: run again after that is mended") from None
    print(f"{len(plan.truths):,} images in {out}/{config.into}")


def _zero_shot(rows: datasets.Dataset, config: PrepareConfig) -> _Plan:
    require_column(rows, "label", config.label)
    names = _class_names(rows, config)
    labels = column(rows, config.label)
    for row, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < len(names):
            raise ConfigError(f"label: row {row} is class {label}, the classes are 0..{len(names) - 1}")
    prompts = SIMPLE if config.templates is None else read_lines(Path(config.templates))
    if not prompts or any("{c}" not in prompt for prompt in prompts):
        raise ConfigError(f"templates: {config.templates}: expected a prompt per line, each with {{c}} for the class")
    texts = {"dataset_type.txt": "classification\n", CLASS_NAMES: _lines(names), TEMPLATES: _lines(prompts)}
    return _Plan(texts, [{"cls": str(label).encode()} for label in labels], _images_of(rows, config.image))


def _class_names(rows: datasets.Dataset, config: PrepareConfig) -> list[str]:
    if config.class_names is not None:
        names = list(read_lines(Path(config.class_names)))
    else:
        names = list(getattr(rows.features[config.label], "names", None) or [])  # of a ClassLabel
    if not names or not all(name.strip() for name in names):
        raise ConfigError(
            "class_names: the source does not name its classes: give a file with a name per line, class_names=FILE"
        )
    return names


def _retrieval(rows: datasets.Dataset, config: PrepareConfig) -> _Plan:
    require_column(rows, "caption", config.caption)
    truths = []
    for row, captions in enumerate(column(rows, config.caption)):
        captions = [captions] if isinstance(captions, str) else captions or []
        if not all(isinstance(caption, str) for caption in captions):
            raise ConfigError(f"caption={config.caption}: row {row} holds no text")
        lines = [" ".join(caption.split()) for caption in captions if caption.strip()]  # a caption is one line
        if not lines:
            raise ConfigError(f"caption={config.caption}: row {row} has no caption")
        truths.append({"txt": _lines(lines).encode()})
    return _Plan({"dataset_type.txt": "retrieval\n"}, truths, _images_of(rows, config.image))


def _images_of(rows: datasets.Dataset, name: str) -> Callable[[int], bytes]:
    require_column(rows, "image", name)
    return lambda row: image_bytes(value(rows, row, name), f"image={name}: row {row}")


def _winogavil(rows: datasets.Dataset, config: PrepareConfig) -> _Plan:
    """Pictures are the same if they have the same name and bytes."""
    for name in ("cue", "candidates", "candidate_images", "associations"):
        require_column(rows, "task=winogavil", name)
    places: dict[tuple[str, str], tuple[int, int]] = {}  # (name, digest) -> a row that has it, and where
    questions = []
    for row in tqdm(range(len(rows)), desc="questions", disable=None):
        cue, names, associations = (value(rows, row, name) for name in ("cue", "candidates", "associations"))
        pictures = value(rows, row, "candidate_images")
        if len(pictures) != len(names) or not associations or not set(associations) <= set(names):
            raise ConfigError(f"row {row}: {len(pictures)} images for {names}, of which {associations} are right")
        digests = [_digest(image_bytes(picture, f"candidate_images: row {row}")) for picture in pictures]
        for position, picture in enumerate(zip(names, digests, strict=True)):
            places.setdefault(picture, (row, position))
        questions.append((cue, list(zip(names, digests, strict=True)), set(associations)))
    keys = {picture: _key(number) for number, picture in enumerate(places)}
    lines = [_question_line(cue, pictures, right, keys) for cue, pictures, right in questions]
    where = list(places.values())

    def image(number: int) -> bytes:
        row, position = where[number]
        return image_bytes(value(rows, row, "candidate_images")[position], f"candidate_images: row {row}")

    texts = {"dataset_type.txt": "winogavil\n", QUESTIONS: _lines(lines)}
    return _Plan(texts, [{"txt": name.encode()} for name, _ in places], image)


def _question_line(cue: str, pictures: list[tuple[str, str]], right: set[str], keys: dict) -> str:
    candidates = [keys[picture] for picture in pictures]
    associations = [keys[picture] for picture in pictures if picture[0] in right]
    return json.dumps({"cue": cue, "candidates": candidates, "associations": associations}, ensure_ascii=False)


def _write(plan: _Plan, out: Path, config: PrepareConfig) -> None:
    part = _claim(out, config, len(plan.truths))
    starts = range(0, len(plan.truths), config.samples_per_shard)
    bar = tqdm(total=len(plan.truths), desc="prepare", unit="image", disable=None)
    for number, start in enumerate(starts):
        samples = range(start, min(start + config.samples_per_shard, len(plan.truths)))
        if not (part / f"{number}.tar").exists():
            with replacing(part / f"{number}.tar") as temporary, temporary.open("wb") as file:
                _write_tar(file, samples, plan)
        bar.update(len(samples))
    bar.close()
    replace_text(part / "nshards.txt", f"{len(starts)}\n")
    for name, text in plan.texts.items():
        _write_beside(out / name, text)
    (part / SETTINGS).unlink()
    part.rename(out / config.into)  # only now the set is there


def _claim(out: Path, config: PrepareConfig, num_images: int) -> Path:
    """The folder of the unfinished split; what another source or other settings left in it is gone."""
    part = out / f".{config.into}.part"
    settings = json.dumps(config.model_dump(mode="json") | {"num_images": num_images}, indent=1)
    if part.exists() and (not (part / SETTINGS).exists() or (part / SETTINGS).read_text() != settings):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    for left in part.glob(".*.tmp"):  # by a run that was killed
        left.unlink(missing_ok=True)
    replace_text(part / SETTINGS, settings)
    return part


def _write_beside(path: Path, text: str) -> None:
    """A file that both splits have in common; raises ConfigError where the other split needs another one."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path}: belongs to another set: choose another folder for out")
    replace_text(path, text)


def _write_tar(file: io.BufferedWriter, samples: range, plan: _Plan) -> None:
    with TarWriter(file, encoder=False, mtime=0, user="root", group="root") as tar:
        for number in samples:
            data = plan.image(number)
            tar.write({"__key__": _key(number), _extension(data): data, **plan.truths[number]})


def _extension(data: bytes) -> str:
    """Of the three kinds that the layout has; what is none of them is told by its bytes when it is read."""
    try:
        return EXTENSIONS.get(Image.open(io.BytesIO(data), formats=FORMATS).format, "jpg")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "jpg"


def _key(number: int) -> str:
    return f"{number:07d}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lines(lines: Any) -> str:
    return "".join(f"{line}\n" for line in lines)
