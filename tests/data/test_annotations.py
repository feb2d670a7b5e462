"""COCO's and ALBEF's json: captions with their images, and alone."""

from __future__ import annotations

import json

import pytest

from kd_accel.data.source import BadSample
from kd_accel.data.tables import open_table
from kd_accel.schema import ConfigError


@pytest.fixture
def coco(tmp_path, jpeg):
    """COCO's layout: annotations/captions_val2017.json, val2017/; the captions are not in the images' order."""
    images = [{"id": 7, "file_name": "seven.jpg"}, {"id": 3, "file_name": "three.jpg"}, {"id": 5, "file_name": "5.jpg"}]
    pairs = [(3, "c"), (7, "a"), (3, "d"), (7, "b\n")]
    annotations = [{"image_id": image, "id": i, "caption": text} for i, (image, text) in enumerate(pairs)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    for number, name in ((7, "seven"), (3, "three"), (5, "5")):
        (tmp_path / f"val2017/{name}.jpg").write_bytes(jpeg(number))
    path = tmp_path / "annotations/captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


def test_coco(coco, jpeg):
    """A row per image with all its captions; images lie in COCO's own place, one without captions is bad."""
    source = open_table(str(coco))
    samples = [source.read(i) for i in (0, 1)]
    assert [(s.key, s.captions, s.image) for s in samples] == [
        ("seven.jpg", ("a", "b"), jpeg(7)),
        ("three.jpg", ("c", "d"), jpeg(3)),
    ]
    assert source.num_samples == 3
    with pytest.raises(BadSample, match="caption is empty"):
        source.read(2)
    assert open_table(str(coco), caption=None).read(2).image == jpeg(5)


def test_coco_elsewhere(coco, tmp_path, jpeg):
    """image_root names the folder of the images; without it and COCO's layout they lie beside the json."""
    moved = tmp_path / "mine.json"
    moved.write_bytes(coco.read_bytes())
    assert open_table(str(moved), image_root=f"{tmp_path}/val2017").read(0).image == jpeg(7)
    with pytest.raises(ConfigError, match=f"none of the first 3 images of .* the first is {tmp_path}/seven.jpg"):
        open_table(str(moved))


def test_coco_as_text(coco):
    """Without images every caption is a sample, in the file's order."""
    source = open_table(str(coco), image=None)
    assert [source.read(i).captions for i in range(source.num_samples)] == [("c",), ("a",), ("d",), ("b",)]
    assert source.read(0).image is None


def test_albef(tmp_path, jpeg):
    """One caption or a list of them, in one file; other keys are columns as well."""
    rows = [
        {"image": "a.jpg", "caption": "one", "image_id": "coco_1", "cls": 4},
        {"image": "a.jpg", "caption": ["two", "three"], "image_id": "coco_2", "cls": 5},
    ]
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    source = open_table(str(path), label="cls")
    assert [(s.captions, s.label, s.image) for s in map(source.read, (0, 1))] == [
        (("one",), 4, jpeg(1)),
        (("two", "three"), 5, jpeg(1)),
    ]
    assert open_table(str(path), image=None, caption="image_id").read(1).captions == ("coco_2",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": 2}', "not valid JSON: .*; an object per line is .jsonl"),
        ("[", "not valid JSON"),
        ('{"images": []}', r'neither \{"images".*\} \(COCO\) nor a list of objects \(ALBEF\): KeyError'),
        ("[1, 2]", "neither .* TypeError"),
        ("7", "neither .* TypeError"),
        ("[]", "data.image: .* has no column 'image'; .* of which there are none"),
        (
            '[{"image": "a", "text": "b"}]',
            "data.caption: .* has no column 'caption'; set .* one of image, text or null",
        ),
        ('[{"image": 1, "caption": "b"}]', "data.image: the column 'image' of .* holds int64, expected paths"),
        ('[{"image": "a", "caption": "\\ud800"}]', "data.table: .* cannot be read: .*surrogates"),
    ],
)
def test_mistakes_in_one_line(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        open_table(str(path))
    assert "\n" not in str(error.value)
