"""Evaluation sets of every layout on two processes give the rows of one process."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import run_process
from PIL import Image

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def write_picture(path: Path, seed: int) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(file, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def write_class_folders(folder: Path) -> None:
    """Two classes with 5 and 4 pictures, one of them broken, and one without any."""
    for i in range(9):
        write_picture(folder / "val" / f"class_{i % 2}" / f"{i}.png", i)
    (folder / "val" / "class_1" / "3.png").write_bytes(b"no picture")
    (folder / "val" / "class_2").mkdir()


def write_captions(folder: Path) -> None:
    """COCO's layout, with fewer images than there are ranks."""
    write_picture(folder / "val2017" / "a.png", 20)
    (folder / "annotations").mkdir()
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "noise"}] * 2}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))


def write_mnist(folder: Path) -> None:
    """torchvision's files: the same seven digits for both splits."""
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", np.arange(7, dtype=np.uint8))):
            (folder / "raw").mkdir(parents=True, exist_ok=True)
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (folder / "raw" / f"{part}-{kind}-ubyte").write_bytes(header + values.tobytes())


def write_winogavil(folder: Path) -> None:
    """The authors' table: three questions about six pictures."""
    for i in range(6):
        write_picture(folder / "winogavil_images" / f"p{i}.jpg", 30 + i)
    names = [f'""p{i}""' for i in range(6)]
    lists = [f'"[{", ".join(names[start:])}]","[{names[start]}]"' for start in (0, 1, 0)]
    lines = [f"cue {i},{row}" for i, row in enumerate(lists)]
    (folder / "winogavil_dataset.csv").write_text("\n".join(["cue,candidates,associations", *lines]))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "untrained")


def test_rows_are_those_of_one_process(tmp_path, release, run_ranks):
    """Equal byte for byte, in every layout; what is unreadable is counted once."""
    write_class_folders(tmp_path / "sets" / "classes")
    write_captions(tmp_path / "sets" / "coco2017")
    write_mnist(tmp_path / "sets" / "MNIST")
    write_winogavil(tmp_path / "sets" / "winogavil")
    command = ["-m", "kd_accel", "eval", str(release), f"data={tmp_path / 'sets'}", "batch_size=2", "num_workers=1"]
    run_ranks([*command, f"output={tmp_path / 'two'}"], nproc=2)
    run_process([sys.executable, *command, f"output={tmp_path / 'one'}"])
    one, two = (re.sub(r', "seconds": [\d.]+', "", (tmp_path / name).read_text()) for name in ("one", "two"))
    assert two == one
    rows = [json.loads(line) for line in one.splitlines()]
    assert [(row["key"], row["n"], row["bad"]) for row in rows] == [
        ("MNIST", 7, 0),
        ("classes", 8, 1),
        ("coco2017", 1, 0),
        ("winogavil", 6, 0),
    ]
