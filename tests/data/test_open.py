"""From a config to its samples, for every kind of source."""

from __future__ import annotations

import json
import tarfile
from itertools import islice

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from kd_accel import pack
from kd_accel.config_files import load
from kd_accel.data.loader import TrainLoader
from kd_accel.data.open import open_one
from kd_accel.data.store_files import shard_names
from kd_accel.data_config import DataConfig, SourceConfig
from kd_accel.pack_config import PackConfig
from kd_accel.schema import ConfigError


@pytest.fixture
def source(make_shards, tmp_path, jpeg):
    """Kind -> the section that names two samples, the same pictures and texts in every kind."""
    for name, i in (("caption 0", 0), ("caption 1", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_bytes(jpeg(i))
    rows = [f"images/caption {i}/0.jpg\tcaption {i}" for i in range(2)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]))
    columns = {"image": [{"bytes": jpeg(i), "path": None} for i in range(2)], "caption": ["caption 0", "caption 1"]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    return {
        "shards": str(make_shards([1, 1])),
        "table": str(tmp_path / "pairs.tsv"),
        "folder": str(tmp_path / "images"),
        "dataset": str(tmp_path / "saved"),
    }


@pytest.mark.parametrize("kind", SourceConfig.KINDS)
def test_every_kind_gives_the_same_samples(source, kind, jpeg):
    """And only what somebody wants to see."""
    section = load(SourceConfig, **{kind: source[kind]})
    for images, captions in ((True, True), (True, False)):
        opened = open_one(section, images=images, captions=captions)
        samples = [opened.read(i) for i in range(opened.num_samples)]
        assert [s.image for s in samples] == [jpeg(0), jpeg(1)]
        assert [s.captions for s in samples] == ([("caption 0",), ("caption 1",)] if captions else [(), ()])
        assert [s.label for s in samples] == [None, None]


@pytest.fixture
def sections(source, tmp_path, jpeg, monkeypatch) -> dict[str, dict]:
    """Every way to name the two samples, by a word for it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"filepath": f"images/caption {i}/0.jpg", "title": f"caption {i}"} for i in range(2)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    inside = [str(tmp_path / f"inside_{i}.parquet") for i in range(2)]
    for i, file in enumerate(inside):
        datasets.load_from_disk(source["dataset"]).select([i]).to_parquet(file)
    named = [{"id": i, "file_name": row["filepath"]} for i, row in enumerate(rows)]
    texts = [{"image_id": i, "caption": f"caption {i}"} for i in (1, 0)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": named, "annotations": texts}))
    pairs = [{"image": row["filepath"], "caption": row["title"]} for row in rows]
    (tmp_path / "albef.json").write_text(json.dumps(pairs))
    files = {
        name: {"table": str(tmp_path / name)} for name in ("pairs.jsonl", "pairs.parquet", "coco.json", "albef.json")
    }
    with_images = {"table": inside, "image": "image", "caption": "caption"}
    return {kind: {kind: source[kind]} for kind in SourceConfig.KINDS} | files | {"images inside": with_images}


WAYS = (*SourceConfig.KINDS, "pairs.jsonl", "pairs.parquet", "coco.json", "albef.json", "images inside")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_of_samples_changes_neither_their_names_nor_their_number(sections, way):
    """A store of texts is made without a look at the pictures, and read by a training that looks at them."""
    section = load(SourceConfig, **sections[way])
    opened = [open_one(section, images=images, captions=True) for images in (True, False)]
    seen, unseen = ([(s.key(i), s.shard(i), s.read(i).captions) for i in range(s.num_samples)] for s in opened)
    assert len(seen) == 2
    assert unseen == seen
    assert [shard_names(source) for source in opened] == [shard_names(opened[0])] * 2
    assert [opened[1].read(i).image for i in range(2)] == [None, None]


def test_options_reach_their_kind(source, tmp_path):
    """max_samples, image_root, split, and the labels of sub-folders."""
    assert (
        open_one(load(SourceConfig, table=source["table"], max_samples=1), images=True, captions=True).num_samples == 1
    )
    folder = open_one(load(SourceConfig, folder=source["folder"], label="auto"), images=True, captions=True)
    assert [folder.read(i).label for i in (0, 1)] == [0, 1]
    with pytest.raises(ConfigError, match="none of the first 2 images .* the first is /nowhere/images"):
        open_one(load(SourceConfig, table=source["table"], image_root="/nowhere"), images=True, captions=True)
    datasets.DatasetDict({"val": datasets.load_from_disk(source["dataset"])}).save_to_disk(tmp_path / "splits")
    split = load(SourceConfig, dataset=str(tmp_path / "splits"), split="val")
    assert open_one(split, images=True, captions=True).num_samples == 2
    with pytest.raises(ConfigError, match="data.max_samples: tars are read whole"):
        open_one(load(SourceConfig, shards=source["shards"], max_samples=1), images=True, captions=True)


def test_training_sees_the_same_through_a_table_and_its_shards(tmp_path, data_root, contract):
    """COCO's photos: ids, views and tokens of two epochs, through loader workers, before and after packing."""
    lines = ["filepath\ttitle"]
    with tarfile.open(data_root / "zeroshot/coco_cc_retrieval/test/0.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for name in sorted(name for name in members if name.endswith(".jpg")):
        (tmp_path / name).write_bytes(members[name])
        lines.append(f"{name}\t{members[name[:-3] + 'txt'].decode().splitlines()[0]}")
    (tmp_path / "coco.csv").write_text("\n".join(lines))
    pack.run(load(PackConfig, table=str(tmp_path / "coco.csv"), out=str(tmp_path / "packed")))
    kinds = {"table": str(tmp_path / "coco.csv"), "shards": str(tmp_path / "packed")}
    loaders = [
        TrainLoader(
            DataConfig(**{kind: path}, batch_size=40), contracts={"student": contract()}, seed=1, rank=0, world_size=1
        )
        for kind, path in kinds.items()
    ]
    assert [loader.steps_per_epoch for loader in loaders] == [2, 2]
    for (table,), (shards,) in zip(*(islice(loader, 4) for loader in loaders), strict=True):
        assert torch.equal(table.ids, shards.ids)
        assert torch.equal(table.image, shards.image)
        assert torch.equal(table.text["student"], shards.text["student"])
