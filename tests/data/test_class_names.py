"""What a source calls the classes that its labels number, where it knows."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import tiny
from PIL import Image

from kd_accel.config import DataConfig
from kd_accel.data.open import open_source
from kd_accel.schema import validate


@pytest.fixture
def folder(tmp_path):
    """A function: class names -> a folder with a picture of each."""

    def make(name: str, *classes: str) -> str:
        for each in classes:
            (tmp_path / name / each).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / each / "a.png")
        return str(tmp_path / name)

    return make


def names(**section):
    source, _ = open_source(validate(DataConfig, {"batch_size": 2} | section), images=True, captions=False)
    return source.class_names


def test_of_a_folder_its_sub_folders(folder):
    """In the order of their numbers, where labels are read."""
    given = folder("pets", "dog", "cat")
    assert names(folder=given, label="auto") == ("cat", "dog")
    assert names(folder=given) is None


@pytest.mark.parametrize(("feature", "known"), [(datasets.ClassLabel(names=["b", "a"]), ("b", "a")), (None, None)])
def test_of_a_dataset_its_class_label(tmp_path, feature, known):
    rows = {"image": [Image.fromarray(np.zeros((8, 8, 3), np.uint8))] * 2, "fine": [1, 0]}
    dataset = datasets.Dataset.from_dict(rows)
    (dataset if feature is None else dataset.cast_column("fine", feature)).save_to_disk(tmp_path / "saved")
    assert names(dataset=str(tmp_path / "saved"), label="fine") == known


def test_of_several_sources_what_they_agree_on(folder):
    one, same, other = folder("one", "cat", "dog"), folder("same", "cat", "dog"), folder("other", "cat", "eel")

    def together(*folders):
        return names(sources={f"s{n}": {"folder": f, "label": "auto"} for n, f in enumerate(folders)})

    assert together(one, same) == ("cat", "dog")
    assert together(one, other) is None


def test_tars_know_numbers_alone(tmp_path):
    assert names(shards=str(tiny.write_shards(tmp_path / "tars", per_shard=4)), label="cls") is None
