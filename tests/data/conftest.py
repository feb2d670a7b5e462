"""Small real shards: tars of PIL jpegs with captions, some of them broken in a chosen way."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_accel.data.index import build_index, expand_shards
from kd_accel.types import ImageInput, InputContract, TextInput

Members = dict[str, bytes]  # extension -> content


def _jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """An image of its own for every seed; `size` is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def _write_tar(path: Path, samples: list[tuple[str, Members]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def _good(sample_id: int) -> Members:
    return {"jpg": _jpeg(sample_id), "txt": f"caption {sample_id}".encode(), "json": b"{}"}


# kind -> (what the sample holds instead, the reason it is rejected for)
BROKEN: dict[str, tuple[Callable[[int], Members], str]] = {
    "no caption": (lambda i: {"jpg": _jpeg(i), "json": b"{}"}, "caption member is missing"),
    "no image": (lambda i: {"txt": b"a caption", "json": b"{}"}, "image member is missing"),
    "empty caption": (lambda i: {**_good(i), "txt": b" \n\t"}, "caption is empty"),
    "not UTF-8": (lambda i: {**_good(i), "txt": b"caf\xe9"}, "caption is not UTF-8"),
    "cut image": (lambda i: {**_good(i), "jpg": _jpeg(i)[:-200]}, "image cannot be decoded"),
    "no JPEG": (lambda i: {**_good(i), "jpg": b"<html>404</html>"}, "image cannot be decoded"),
}


@pytest.fixture
def jpeg() -> Callable[..., bytes]:
    return _jpeg


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    return _write_tar


@pytest.fixture
def broken() -> dict[str, tuple[Callable[[int], Members], str]]:
    return BROKEN


@pytest.fixture
def make_shards(tmp_path) -> Callable[..., Path]:
    """(samples of each shard, {id: kind of BROKEN}) -> an indexed folder 0000.tar, 0001.tar, ..."""

    def make(sizes: list[int], bad: dict[int, str] | None = None, *, index: bool = True) -> Path:
        folder = tmp_path / "shards"
        folder.mkdir()
        kinds, first = bad or {}, 0
        for shard, size in enumerate(sizes):
            ids = range(first, first + size)
            samples = [(f"{i:06d}", BROKEN[kinds[i]][0](i) if i in kinds else _good(i)) for i in ids]
            _write_tar(folder / f"{shard:04d}.tar", samples)
            first += size
        if index:
            build_index(expand_shards(str(folder)))
        return folder

    return make


@pytest.fixture
def contract() -> Callable[..., InputContract]:
    """Contracts of a tokenizer whose tokens are the caption's bytes."""

    def make(
        size: tuple[int, int] = (16, 16), *, context_length: int = 16, tokenizer="bytes", tokenize=None, **changes
    ) -> InputContract:
        def tokens(captions: list[str]) -> torch.Tensor:
            rows = [caption.encode()[:context_length].ljust(context_length, b"\0") for caption in captions]
            return torch.tensor([list(row) for row in rows])

        pixels = {
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        image = ImageInput(size, **{**pixels, **changes})
        return InputContract(image, TextInput(context_length, tokenizer, tokenize or tokens, pad=None))

    return make
