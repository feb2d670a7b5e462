"""Class folders as evaluation sets: which index and name a class has, and which pictures belong to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from open_clip import IMAGENET_CLASSNAMES

from kd_accel.data.source import BadSample
from kd_accel.data.transforms import decode
from kd_accel.evals.image_folder import BIRDSNAP_EMPTY, open_image_folder
from kd_accel.evals.prompts import IMAGENET
from kd_accel.schema import ConfigError


@pytest.fixture
def folder(tmp_path, picture):
    """{class: number of pictures} -> a set with them in `part`."""

    def make(classes: dict[str, int], part: str = "test", name: str = "things") -> Path:
        for label, (class_name, count) in enumerate(classes.items()):
            place = tmp_path / name / part / class_name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i}.png").write_bytes(picture(10 * label + i))
        return tmp_path / name

    return make


def test_a_class_is_a_folder(folder, picture):
    """Indices follow the sorted names; `_` in a name is a space; a class without pictures counts."""
    found = open_image_folder(folder({"red_fox": 2, "ant": 1, "cat": 0}))
    assert (found.name, found.kind, found.class_names) == ("things", "zero_shot", ("ant", "cat", "red fox"))
    assert found.templates == ("a photo of a {c}.",)
    samples = found.samples()
    assert [(s.key, s.label) for s in samples] == [("ant/0.png", 0), ("red_fox/0.png", 2), ("red_fox/1.png", 2)]
    assert found.image(samples[0]).tobytes() == decode(picture(10)).tobytes()


def test_names_in_one_word(folder):
    """UCF101's folders; one name of another kind leaves all as they are."""
    assert open_image_folder(folder({"YoYo": 1, "ApplyEyeMakeup": 1})).class_names == ("Apply Eye Makeup", "Yo Yo")
    assert open_image_folder(folder({"iPhone": 1, "TaiChi": 1}, name="others")).class_names == ("TaiChi", "iPhone")


@pytest.mark.parametrize("part", ["test", "val", "valid", "testlist01", ""])
def test_where_the_test_split_lies(folder, part):
    """Below the set's folder, or in it."""
    found = open_image_folder(folder({"a": 1, "b": 1}, part), name="vtab/things")
    assert (found.name, len(found.samples())) == ("vtab/things", 2)


def test_splits_are_apart(folder):
    """The test split is never read as the one for training, nor the other way round."""
    root = folder({"a": 1, "b": 1}, "val")
    assert open_image_folder(root, split="train") is None
    folder({"a": 3, "b": 2}, "train")
    assert len(open_image_folder(root, split="train").samples()) == 5
    assert len(open_image_folder(root).samples()) == 2


def test_a_training_split_alone_is_no_test(folder):
    assert open_image_folder(folder({"a": 1, "b": 1}, "train")) is None


def test_flat_folders_of_splits_are_no_classes(folder):
    """COCO without its annotations is not a set of the classes train2017 and val2017."""
    assert open_image_folder(folder({"train2017": 1, "val2017": 1, "annotations": 0}, "")) is None
    assert open_image_folder(folder({"train": 1, "bus": 1}, "", "vehicles")).class_names == ("bus", "train")


def test_names_and_prompts_beside(folder):
    """classnames.txt and templates in the set's folder win, in the order of the class indices."""
    root = folder({"a": 1, "b": 1})
    (root / "classnames.txt").write_text("\ufeffan apple\na banana\n", encoding="utf-8")  # as Windows begins a text
    (root / "zeroshot_classification_templates.txt").write_text("{c}!\n")
    found = open_image_folder(root)
    assert (found.class_names, found.templates) == (("an apple", "a banana"), ("{c}!",))


@pytest.mark.parametrize("keys", [("0", "1"), ("a", "b")])
def test_label_text(folder, keys):
    """By class index or by folder."""
    root = folder({"a": 1, "b": 1})
    (root / "label_text.json").write_text(json.dumps(dict(zip(keys, ["tench, Tinca tinca", "hen"], strict=True))))
    assert open_image_folder(root).class_names == ("tench, Tinca tinca", "hen")


def test_imagenet_by_synset(folder):
    """The names of a part of ImageNet's classes, as in ImageNet-A: the second and the eighth."""
    found = open_image_folder(folder({"n01514668": 1, "n01443537": 1}, "val"))
    assert found.class_names == ("goldfish", "rooster") == (IMAGENET_CLASSNAMES[1], IMAGENET_CLASSNAMES[7])
    assert found.templates == IMAGENET
    assert len(found.templates) == 80


def test_imagenetv2_by_number(folder):
    """1,000 folders 0 to 999, whose order is that of the numbers and not of the texts."""
    found = open_image_folder(folder({str(i): int(i == 10) for i in range(1000)}, ""), name="imagenetv2")
    assert found is None  # one class with a picture is no sign of a set
    root = folder({str(i): int(i in (2, 10)) for i in range(1000)}, "val", "v2")
    found = open_image_folder(root, name="imagenetv2")
    assert found.class_names == tuple(IMAGENET_CLASSNAMES)
    assert [s.label for s in found.samples()] == [2, 10]


def test_a_task_has_openai_prompts(folder):
    assert open_image_folder(folder({"a": 1, "b": 1}), name="stl10").templates == (
        "a photo of a {c}.",
        "a photo of the {c}.",
    )


@pytest.mark.parametrize("empty_folders", [True, False])
def test_birdsnap_without_its_empty_classes(folder, empty_folders):
    """protoclip's rule: 9 of the 500 classes have no picture and are no classes, whether their folders are there."""
    counts = {f"{i:03d}": int(i not in BIRDSNAP_EMPTY) for i in range(500) if empty_folders or i not in BIRDSNAP_EMPTY}
    root = folder(counts)
    (root / "classnames.txt").write_text("".join(f"bird {i}\n" for i in range(500)))
    found = open_image_folder(root, name="birdsnap")
    samples = found.samples()
    assert len(found.class_names) == len(samples) == 491
    assert all(found.class_names[s.label] == f"bird {int(s.key[:3])}" for s in samples)
    assert found.templates == ("a photo of a {c}, a type of bird.",)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("classnames.txt", "one\n", r"classnames.txt: expected 2 class names, one per line, found 1"),
        ("classnames.txt", "one\n\nthree\n", r"expected 2 class names, one per line, found 2"),
        ("label_text.json", '{"0": "x"}', r"label_text.json: no name for class a"),
        ("label_text.json", "[1", r"label_text.json: cannot be read as JSON"),
        ("zeroshot_classification_templates.txt", "a photo of {}", r"templates.txt: .*placeholder \{c\}"),
    ],
)
def test_a_bad_file_beside_is_named(folder, file, text, said):
    root = folder({"a": 1, "b": 1})
    (root / file).write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_image_folder(root)


def test_names_that_are_no_utf8(folder):
    root = folder({"a": 1, "b": 1})
    (root / "classnames.txt").write_bytes(b"caf\xe9\ntea\n")
    with pytest.raises(ConfigError, match="classnames.txt: cannot be read as UTF-8"):
        open_image_folder(root)


def test_numbers_are_no_names(folder):
    """`a photo of a 046.` would be evaluated without a word; ten numbers are digits."""
    with pytest.raises(ConfigError, match="class folders are numbers: put classnames.txt there"):
        open_image_folder(folder({f"{i:03d}": 1 for i in range(11)}))
    assert open_image_folder(folder({str(i): 1 for i in range(10)}, name="digits")).class_names == tuple("0123456789")


def test_a_synset_outside_of_imagenet_1k(folder):
    with pytest.raises(ConfigError, match="n99999999 is no class of ImageNet-1k"):
        open_image_folder(folder({"n01440764": 1, "n99999999": 1}))


def test_what_is_no_picture(folder, tmp_path, picture):
    """Hidden files and folders, texts and links in a circle are passed over; a broken one is told when it is read."""
    root = folder({"a": 1, "b": 1})
    place = root / "test" / "a"
    (place / ".hidden.png").write_bytes(picture(0))
    (place / "readme.txt").write_text("no picture")
    (place / "deeper").mkdir()
    (place / "deeper" / "x.PNG").write_bytes(picture(1)[:40])
    (place / "deeper" / "circle").symlink_to(place)
    (place / "gone.jpg").symlink_to(tmp_path / "absent")
    (root / "test" / ".DS_Store").mkdir()
    found = open_image_folder(root)
    assert found.class_names == ("a", "b")
    samples = found.samples()
    assert [s.key for s in samples] == ["a/0.png", "a/gone.jpg", "a/deeper/x.PNG", "b/0.png"]
    for broken in samples[1:3]:
        with pytest.raises(BadSample):
            found.image(broken)


def test_a_linked_class_and_a_name_that_is_no_utf8(folder, picture):
    root = folder({"a": 2, "b": 1})
    (root / "test" / "c").symlink_to(root / "test" / "a")
    (root / "test" / "b" / os.fsdecode(b"\xe9.png")).write_bytes(picture(5))
    samples = open_image_folder(root).samples()
    assert [(s.key, s.label) for s in samples[3:]] == [("b/\\xe9.png", 1), ("c/0.png", 2), ("c/1.png", 2)]


def test_a_set_that_loses_its_pictures(folder):
    """Between opening and reading; an empty set gives no metric."""
    root = folder({"a": 1, "b": 1})
    found = open_image_folder(root)
    for path in root.rglob("*.png"):
        path.unlink()
    with pytest.raises(ConfigError, match="no pictures in its 2 class folders"):
        found.samples()
    assert open_image_folder(root) is None
