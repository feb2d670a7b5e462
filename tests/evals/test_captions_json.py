"""Captions in json files as evaluation sets: COCO's and ALBEF's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_accel.data.transforms import decode
from kd_accel.evals.captions_json import open_captions
from kd_accel.schema import ConfigError

COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
    "annotations": [
        {"image_id": 3, "caption": " an apple "},
        {"image_id": 7, "caption": "a bee"},
        {"image_id": 3, "caption": "red fruit\n"},
    ],
}


def write(root: Path, file: str, content, picture, images: tuple[str, ...] = ()) -> Path:
    for i, name in enumerate(images):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return root


def test_coco(tmp_path, picture):
    """All captions of an image, images in the order of the list."""
    images = ("val2017/b.png", "val2017/a.png")
    root = write(tmp_path / "coco2017", "annotations/captions_val2017.json", COCO, picture, images)
    found = open_captions(root)
    assert (found.name, found.kind) == ("coco2017", "retrieval")
    samples = found.samples()
    assert [(s.key, s.captions) for s in samples] == [("b.png", ("a bee",)), ("a.png", ("an apple", "red fruit"))]
    assert found.image(samples[1]).tobytes() == decode(picture(1)).tobytes()


@pytest.mark.parametrize("place", ["", "..", "images", "../images"])
def test_albef(tmp_path, picture, place):
    """A list, named or given as a file; one caption or several, and an image that comes twice is one image."""
    rows = [
        {"image": "val2014/x.png", "caption": ["one", "two"]},
        {"image": "val2014/y.png", "caption": "three"},
        {"image": "val2014/x.png", "caption": "four"},
    ]
    root = write(tmp_path / "sets" / "here", "coco_karpathy_test.json", rows, picture)
    for i, name in enumerate("xy"):
        image = root / place / "val2014" / f"{name}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(picture(i))
    for found in (open_captions(root, name="coco"), open_captions(root / "coco_karpathy_test.json", name="coco")):
        samples = found.samples()
        assert [(s.key[-5:], s.captions) for s in samples] == [("x.png", ("one", "two", "four")), ("y.png", ("three",))]
        assert found.image(samples[1]).size == (40, 36)


def test_names(tmp_path, picture):
    root = write(tmp_path / "flickr.v2", "flickr30k_test.json", [], picture)
    assert open_captions(root).name == "flickr.v2"
    assert open_captions(root / "flickr30k_test.json").name == "flickr30k_test"


def test_no_sign_of_the_layout(tmp_path, picture):
    """A folder without such a file, another file; and there is no training split."""
    assert open_captions(tmp_path) is None
    root = write(tmp_path, "coco_karpathy_test.json", [], picture)
    assert open_captions(root, split="train") is None
    assert open_captions(tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "cannot be read as JSON"),
        (b'["caf\xe9"]', "cannot be read as JSON"),
        ({"images": []}, "neither .*COCO.* nor .*ALBEF.*KeyError"),
        ([{"image": "x.png", "text": "one"}], "neither .*COCO.* nor .*ALBEF"),
        ([{"image": "x.png", "caption": [1]}], "neither .*COCO.* nor .*ALBEF"),
        (["x.png"], "neither .*COCO.* nor .*ALBEF"),
        ("text", "neither .*COCO.* nor .*ALBEF"),
        ([], "lists no image"),
        ([{"image": "x.png", "caption": " "}], "x.png has no caption"),
        (COCO | {"annotations": COCO["annotations"][1:2]}, "a.png has no caption"),
        (COCO | {"annotations": [{"image_id": 9, "caption": "x"}]}, "neither"),
        ([{"image": "gone.png", "caption": "x"}], "gone.png first, are in none of"),
    ],
)
def test_a_bad_file_costs_one_line(tmp_path, picture, content, said):
    root = write(tmp_path / "set", "coco_karpathy_test.json", content, picture, ("x.png",))
    found = open_captions(root)
    with pytest.raises(ConfigError, match=said) as error:
        found.samples()
    assert "coco_karpathy_test.json" in str(error.value)
    assert "\n" not in str(error.value)
