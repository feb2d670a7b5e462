"""Datasets of the library `datasets`, offline: images stay encoded, whatever the dataset was written from."""

from __future__ import annotations

import pickle

import datasets
import pytest

from kd_accel.data.huggingface import open_dataset
from kd_accel.data.source import BadSample
from kd_accel.data.tables import open_table
from kd_accel.schema import ConfigError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """What `datasets` copies goes nowhere else."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def dataset(jpeg, tmp_path):
    """Three images, one of them by its path, with lists of captions, class labels and a nested text."""
    (tmp_path / "2.jpg").write_bytes(jpeg(2))
    images = [{"bytes": jpeg(0), "path": "0.jpg"}, {"bytes": b"broken", "path": None}, str(tmp_path / "2.jpg")]
    columns = {
        "image": images,
        "caption": [["a", "b"], ["c"], []],
        "cls": [1, 0, 1],
        "meta": [{"title": "t"}, None, {"title": "u"}],
        "other": [1, 2, 3],
    }
    features = {
        "image": datasets.Image(),
        "caption": datasets.List(datasets.Value("string")),
        "cls": datasets.ClassLabel(names=["cat", "dog"]),
        "meta": {"title": datasets.Value("string")},
        "other": datasets.Value("int64"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def test_a_saved_dataset(dataset, tmp_path, jpeg):
    """Undecoded bytes, also those that are no image; a row without captions is bad; the key is the row."""
    dataset.save_to_disk(tmp_path / "saved")
    source = open_dataset(str(tmp_path / "saved"), label="cls", synthetic="meta:title")
    first, second = source.read(0), source.read(1)
    assert (first.image, first.captions, first.label, first.synthetic) == (jpeg(0), ("a", "b"), 1, ("t",))
    assert (second.image, second.captions, second.label, second.synthetic) == (b"broken", ("c",), 0, ())
    assert (second.key, source.shard(1), source.shard_sizes.tolist()) == ("1", str(tmp_path / "saved"), [3])
    with pytest.raises(BadSample, match="caption is empty"):
        source.read(2)
    assert open_dataset(str(tmp_path / "saved"), caption=None).read(2).image == jpeg(2)
    assert pickle.loads(pickle.dumps(source)).read(0) == first
    assert open_dataset(str(tmp_path / "saved"), max_samples=1).num_samples == 1


def test_splits(dataset, tmp_path):
    datasets.DatasetDict({"train": dataset, "val": dataset.select([1])}).save_to_disk(tmp_path / "saved")
    assert open_dataset(str(tmp_path / "saved"), split="val").read(0).captions == ("c",)
    with pytest.raises(ConfigError, match=r"data.split: .* has no split 'vall'; did you mean 'val'\?"):
        open_dataset(str(tmp_path / "saved"), split="vall")


def test_a_folder_of_parquet_files_as_on_the_hub(dataset, tmp_path, jpeg):
    """load_dataset's own way, which a name on the Hub takes too."""
    (tmp_path / "hub/data").mkdir(parents=True)
    for i, rows in enumerate(([0], [1])):
        dataset.select(rows).to_parquet(tmp_path / f"hub/data/train-0000{i}-of-00002.parquet")
    source = open_dataset(str(tmp_path / "hub"))
    assert [(source.read(i).image, source.read(i).captions) for i in (0, 1)] == [
        (jpeg(0), ("a", "b")),
        (b"broken", ("c",)),
    ]


def test_parquet_with_images_inside_as_a_table(dataset, tmp_path, jpeg):
    """The same rows through data.table."""
    dataset.to_parquet(tmp_path / "x.parquet")
    source = open_table(str(tmp_path / "x.parquet"), image="image", caption="caption", label="cls")
    assert (source.read(0).image, source.read(0).captions, source.read(0).label) == (jpeg(0), ("a", "b"), 1)
    assert source.read(1).image == b"broken"


def test_mistakes_in_one_line(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/x.jsonl").write_text('{"caption": 1}\n{"caption": ')
    for name, options, message in [
        (tmp_path / "odd", {}, "data.dataset: .*odd: .*JSON parse error"),
        (tmp_path / "none", {}, "data.dataset: .*none"),
        (tmp_path / "saved", {"caption": "captions"}, "data.caption: .* 'captions'; did you mean 'caption'"),
        (tmp_path / "saved", {"caption": "other"}, "data.caption: .* holds int64, expected text or lists of text"),
        (tmp_path / "saved", {"synthetic": "meta:titel"}, "data.synthetic: .* did you mean 'title'"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            open_dataset(str(name), **options)
        assert "\n" not in str(error.value)
