"""The demo's data: scikit-learn's 1,797 handwritten digits, each printed in one of four inks on one of four papers.

Without colours all images of a digit would share a caption, and recall counts only an image's own. Retrieval is
measured on 160 held-out images, one for each combination of digit, ink and paper; top-1 on all 360 held-out images.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kd_accel.data.index import build_index, expand_shards
from kd_accel.schema import ConfigError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {"white": "#ffffff", "yellow": "#ffe13c", "pink": "#ff96be", "cyan": "#50e1eb"}
PAPERS = {"black": "#0a0a0a", "blue": "#1928a0", "green": "#0a5a28", "red": "#8c1419"}
TEMPLATES = (
    "a photo of the digit {digit} in {ink} on {paper}",
    "the handwritten number {digit}, {ink} ink on {paper} paper",
    "{ink} {digit} on a {paper} background",
    "somebody wrote a {digit} with a {ink} pen on {paper} paper",
    "a {paper} card with a {ink} {digit}",
)
IMAGE_SIZE = 32  # pixels; the scans have 8 x 8
TEST_PER_CLASS = 36  # 360 of 1,797
NUM_SHARDS = 6

Sample = tuple[str, dict[str, bytes]]  # key, {extension: content}


def write_data(folder: Path) -> None:
    """Indexed training shards in folder/train; the held-out images in CLIP_benchmark's layouts in folder/test."""
    if (folder / "train" / "manifest.json").exists():  # the index is written last
        print(f"found in {folder}")
        return
    train, test = load_digits()
    samples = [(f"{i:06d}", _image(*row) | {"txt": _caption(i, row)}) for i, row in enumerate(train)]
    for number in range(NUM_SHARDS):
        _write_tar(folder / "train" / f"{number:05d}.tar", samples[number::NUM_SHARDS])
    _write_zero_shot(folder / "test" / "digits", test)
    _write_retrieval(folder / "test" / "digits_retrieval", test)
    build_index(expand_shards(str(folder / "train")))
    print(f"{len(train):,} images in {NUM_SHARDS} shards to train on, {len(test)} held out: {folder}")


def load_digits() -> tuple[list, list]:
    """(training rows, held-out rows) of (pixels [8, 8] in 0..1, digit, ink name, paper name).

    The split is stratified and fixed. Colours take turns, so each digit has every combination within any 16 rows.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ConfigError("demo needs scikit-learn for its images: pip install scikit-learn") from None
    digits = load()
    colors = [(ink, paper) for ink in INKS for paper in PAPERS]
    train, test = [], []
    for i in np.random.default_rng(0).permutation(len(digits.target)):
        digit = int(digits.target[i])
        seen = sum(row[1] == digit for row in [*train, *test])
        ink, paper = colors[seen % len(colors)]
        (test if seen < TEST_PER_CLASS else train).append((digits.images[i] / 16, digit, ink, paper))
    return train, test


def _image(pixels: np.ndarray, digit: int, ink: str, paper: str) -> dict[str, bytes]:
    """The digit in its colours, as a PNG of IMAGE_SIZE."""
    gray = Image.fromarray((pixels * 255).astype(np.uint8)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    ImageOps.colorize(gray, black=PAPERS[paper], white=INKS[ink]).save(file, format="PNG")
    return {"png": file.getvalue()}


def _caption(number: int, row: tuple) -> bytes:
    """Templates take turns."""
    _, digit, ink, paper = row
    return TEMPLATES[number % len(TEMPLATES)].format(digit=DIGITS[digit], ink=ink, paper=paper).encode()


def _write_zero_shot(folder: Path, rows: list) -> None:
    """Ten classes; the templates name every ink and every paper once, so that their mean is about the digit alone."""
    samples = [(f"{i:06d}", _image(*row) | {"cls": str(row[1]).encode()}) for i, row in enumerate(rows)]
    _write_benchmark(folder, "classification", samples)
    colors = enumerate(zip(INKS, PAPERS, strict=True))
    lines = [TEMPLATES[i % len(TEMPLATES)].format(digit="{c}", ink=ink, paper=paper) for i, (ink, paper) in colors]
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(lines) + "\n")
    (folder / "classnames.txt").write_text("\n".join(DIGITS) + "\n")


def _write_retrieval(folder: Path, rows: list) -> None:
    """The first image of each combination of digit, ink and paper, with its caption: no two captions are alike."""
    first = {row[1:]: row for row in reversed(rows)}.values()
    samples = [(f"{i:06d}", _image(*row) | {"txt": _caption(0, row)}) for i, row in enumerate(first)]
    _write_benchmark(folder, "retrieval", samples)


def _write_benchmark(folder: Path, kind: str, samples: list[Sample]) -> None:
    _write_tar(folder / "test" / "0.tar", samples)
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "dataset_type.txt").write_text(f"{kind}\n")


def _write_tar(path: Path, samples: list[Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")  # no times, no owners: the same bytes everywhere
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
