"""Folders of images: sorted, labelled by their sub-folder, captioned by its name or by a json file."""

from __future__ import annotations

import json
import os

import pytest

from kd_accel.data.folders import open_folder
from kd_accel.data.source import BadSample
from kd_accel.schema import ConfigError


def samples(source) -> list[tuple]:
    return [(s.key, s.captions, s.label) for s in map(source.read, range(source.num_samples))]


@pytest.fixture
def classes(tmp_path, jpeg):
    """zebra/2.jpg, cat/b.PNG, cat/deep/a.jpg, and things that are no images."""
    for i, name in enumerate(
        ["zebra/2.jpg", "cat/b.PNG", "cat/deep/a.jpg", "cat/._b.PNG", "cat/notes.txt", "empty/x.md"]
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "images"


def test_classes(classes, jpeg):
    """A label is the number of the sorted sub-folder with images, a caption its name."""
    source = open_folder(str(classes), labels=True)
    assert samples(source) == [
        ("cat/b.PNG", ("cat",), 0),
        ("cat/deep/a.jpg", ("cat",), 0),
        ("zebra/2.jpg", ("zebra",), 1),
    ]
    assert source.read(2).image == jpeg(0)
    assert source.shard(2) == str(classes)
    assert samples(open_folder(str(classes), caption=None))[2] == ("zebra/2.jpg", (), None)
    assert open_folder(str(classes), max_samples=2).num_samples == 2


@pytest.mark.parametrize("names", [("cat", "zebra"), ("0", "1")])
def test_texts_of_classes(classes, tmp_path, names):
    """By the folder's name or by the class number; several texts are several captions."""
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(dict(zip(names, ["a cat", ["a zebra", "stripes"]], strict=True))))
    found = samples(open_folder(str(classes), caption=str(path)))
    assert [captions for _, captions, _ in found] == [("a cat",), ("a cat",), ("a zebra", "stripes")]


def test_a_flat_folder(tmp_path, jpeg):
    """Images only, neither labels nor captions."""
    for name in ("b.jpg", "a.webp", ".hidden.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    assert samples(open_folder(str(tmp_path))) == [("a.webp", (), None), ("b.jpg", (), None)]


def test_names_that_are_not_utf8(tmp_path, jpeg):
    """Such a file is a bad sample, its neighbours are not."""
    for name in (b"a.jpg", b"caf\xe9.jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(jpeg(0))
    source = open_folder(str(tmp_path))
    assert source.read(0).key == "a.jpg"
    assert source.key(1) == r"caf\xe9.jpg"
    with pytest.raises(BadSample, match="row is not UTF-8"):
        source.read(1)


def test_mistakes_in_one_line(classes, tmp_path):
    (tmp_path / "texts.json").write_text('{"cat": "a cat"}')
    (tmp_path / "list.json").write_text('["a cat"]')
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    for folder, caption, message in [
        (tmp_path / "none", "auto", "data.folder: .*none: no such folder"),
        (tmp_path / "nothing", "auto", "data.folder: .*nothing holds no samples"),
        (
            classes,
            tmp_path / "texts.json",
            r'data.caption: .* no text for the folder zebra; expected \{"zebra": "..."\}',
        ),
        (classes, tmp_path / "list.json", "data.caption: .* no text for the folder cat"),
        (classes, tmp_path / "bad.json", "data.caption: .* cannot be read as JSON"),
        (classes, tmp_path / "none.json", "data.caption: .* cannot be read as JSON"),
        (classes / "zebra", tmp_path / "texts.json", "data.caption: .* has no sub-folders with images"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_folder(str(folder), caption=str(caption))
    with pytest.raises(ConfigError, match="data.label: .*zebra has no sub-folders with images"):
        open_folder(str(classes / "zebra"), labels=True)
    with pytest.raises(ConfigError, match="data.caption: for a folder it is one json file"):
        open_folder(str(classes), caption=["a", "b"])
    (classes / "top.jpg").touch()
    with pytest.raises(ConfigError, match="holds images itself and in cat/"):
        open_folder(str(classes))
