"""Small evaluation sets of real images in CLIP_benchmark's layout, and an untrained model to evaluate on them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from kd_accel.evals.encoder import Encoder, load_encoder

Members = dict[str, bytes]  # extension -> content


def _picture(seed: int) -> bytes:
    """An image of its own for every seed, as PNG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((40, 36), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def _write_tar(path: Path, samples: dict[str, Members]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                tiny.add(tar, f"{key}.{extension}", content)
    return path


@pytest.fixture
def picture() -> Callable[[int], bytes]:
    return _picture


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    return _write_tar


@pytest.fixture
def labelled() -> Callable[..., dict[str, Members]]:
    """labels -> one sample per label."""
    return lambda labels: {f"s{i:04d}": {"png": _picture(i), "cls": str(y).encode()} for i, y in enumerate(labels)}


@pytest.fixture
def captioned() -> Callable[..., dict[str, Members]]:
    """numbers of captions -> one sample per number."""

    def make(counts):
        captions = lambda i, count: "\n".join(f"caption {j} of image {i}" for j in range(count))  # noqa: E731
        return {f"s{i:04d}": {"png": _picture(i), "txt": captions(i, c).encode()} for i, c in enumerate(counts)}

    return make


@pytest.fixture
def write_benchmark() -> Callable[..., Path]:
    """(folder, samples of each tar, number of classes; None for a retrieval set) -> the folder."""

    def write(folder: Path, *shards: dict[str, Members], num_classes: int | None = None) -> Path:
        for number, samples in enumerate(shards):
            _write_tar(folder / "test" / f"{number}.tar", samples)
        (folder / "test" / "nshards.txt").write_text(f"{len(shards)}\n")
        (folder / "dataset_type.txt").write_text("retrieval\n" if num_classes is None else "classification\n")
        if num_classes is not None:
            (folder / "classnames.txt").write_text("".join(f"thing {i}\n" for i in range(num_classes)))
            (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
        return folder

    return write


@pytest.fixture(scope="session")
def release(tmp_path_factory) -> Path:
    """An untrained CLIP of one layer per tower, 32 pixels, 12 tokens."""
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "untrained")


@pytest.fixture(scope="session")
def encoder(release) -> Encoder:
    return load_encoder(release)
