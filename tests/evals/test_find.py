"""Which folders hold a set, by layout; and where the set of a task is looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_accel.evals import find
from kd_accel.evals.captions_json import CaptionsSet
from kd_accel.evals.find import find_sets, find_task
from kd_accel.evals.image_folder import ImageFolderSet
from kd_accel.evals.tars import TarSet
from kd_accel.evals.torchvision_sets import TorchvisionSet
from kd_accel.evals.winogavil_set import WinogavilSet
from kd_accel.schema import ConfigError


@pytest.fixture
def one_of_each(tmp_path, write_benchmark, write_tar, labelled, captioned, picture) -> Path:
    """A folder with a set in every layout, and with what is none."""
    root = tmp_path / "sets"
    write_benchmark(root / "wds_vtab-dtd_test", labelled([0, 1]), num_classes=2)
    write_tar(root / "pairs" / "0.tar", captioned([1]))
    pictures = [
        "coco2017/val2017/a.png",
        "imagenet/val/n01440764/0.png",
        "imagenet/val/n01443537/0.png",
        "imagenet/train/n01440764/0.png",
        "imagenet/train/n01443537/0.png",
        "rendered-sst2/test/negative/0.png",
        "rendered-sst2/test/positive/0.png",
        "winogavil/winogavil_images/dog.jpg",
        "downloads/loose.png",
    ]
    for i, name in enumerate(pictures):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(i))
    (root / "coco2017" / "annotations").mkdir()
    captions = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    (root / "coco2017" / "annotations" / "captions_val2017.json").write_text(json.dumps(captions))
    (root / "winogavil" / "winogavil_dataset.csv").write_text(
        'cue,candidates,associations\nx,"[""dog""]","[""dog""]"\n'
    )
    (root / ".cache").mkdir()
    return root


def test_every_layout(one_of_each):
    """A folder of sets gives all of them, sorted by name; what is no set is passed over."""
    assert [(s.name, type(s)) for s in find_sets(one_of_each)] == [
        ("coco2017", CaptionsSet),
        ("imagenet", ImageFolderSet),
        ("pairs", TarSet),
        ("rendered-sst2", TorchvisionSet),
        ("wds_vtab-dtd_test", TarSet),
        ("winogavil", WinogavilSet),
    ]


def test_folders_and_files_in_their_order(one_of_each):
    """A json file of captions is a set by itself."""
    given = [one_of_each / "pairs", str(one_of_each / "coco2017/annotations/captions_val2017.json")]
    found = find_sets(given)
    assert [(s.name, len(s.samples())) for s in found] == [("pairs", 1), ("captions_val2017", 1)]


@pytest.mark.parametrize("layout", ["coco2017", "imagenet", "rendered-sst2", "winogavil"])
def test_sets_of_one_name_are_told_apart(one_of_each, tmp_path, layout):
    """Two copies in different folders are two rows of a report."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / layout).symlink_to(one_of_each / layout)
    found = find_sets([one_of_each / layout, tmp_path / "x" / layout])
    assert [s.name for s in found] == [f"sets/{layout}", f"x/{layout}"]


def test_sets_that_cannot_be_told_apart_are_an_error(one_of_each):
    """They would be one row of a report; the same folder twice, too."""
    folder = one_of_each / "pairs"
    with pytest.raises(ConfigError, match=f"{folder} and {folder} would both be called sets/pairs"):
        find_sets([folder, folder])


def test_no_set_says_what_was_looked_for(tmp_path):
    """In one line, also when the folder does not exist."""
    with pytest.raises(ConfigError, match="no such folder"):
        find_sets(tmp_path / "absent")
    (tmp_path / "some" / "notes").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"looked for dataset_type.txt, .*\*.tar .*class folders .*captions_val2017.json"
    ):
        find_sets(tmp_path / "some")


def test_class_names_beside_class_folders_are_no_broken_tars(tmp_path, picture):
    """classnames.txt is a sign of CLIP_benchmark's layout, unless there are class folders."""
    for name in ("a", "b"):
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        (tmp_path / "set" / "test" / name / "0.png").write_bytes(picture(0))
    (tmp_path / "set" / "classnames.txt").write_text("an apple\na bee\n")
    assert find_sets(tmp_path / "set")[0].class_names == ("an apple", "a bee")


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("vtab/dtd", TarSet),
        ("imagenet1k", ImageFolderSet),
        ("renderedsst2", TorchvisionSet),
        ("coco", CaptionsSet),
        ("misc/winogavil", WinogavilSet),
    ],
)
def test_the_set_of_a_task(one_of_each, tmp_path, key, layout):
    """Under the first root that has it, and with the task's key as its name."""
    found = find_task(key, [tmp_path / "absent", one_of_each])
    assert (type(found), found.name) == (layout, key)
    assert found.samples()


@pytest.mark.parametrize(
    ("key", "folder"),
    [
        ("vtab/cifar100", "wds_vtab-cifar100_test"),
        ("fairness/dollar_street", "wds_dollar_street_test"),  # as DataComp, fairness/ falls
        ("wilds/iwildcam", "wds_wilds-iwildcam_test"),  # and wilds/ does not
        ("imagenet-a", "wds_imagenet-a_test"),
        ("cars", "stanford_cars"),
        ("birdsnap", "birdsnap"),
        ("vtab/flowers", "flowers102"),
    ],
)
def test_where_a_task_lies(tmp_path, write_benchmark, labelled, key, folder):
    """The places are told where it is in none of them."""
    looked_for = find_task(key, [tmp_path])
    assert str(tmp_path / folder) in looked_for
    assert len(looked_for) == len(set(looked_for))
    write_benchmark(tmp_path / folder, labelled([0]), num_classes=1)
    assert find_task(key, [tmp_path]).name == key


def test_the_training_split(one_of_each, write_benchmark, labelled, write_tar):
    """It is found where there is one, and the test split never stands for it."""
    assert [s.key for s in find_task("imagenet1k", [one_of_each], "train").samples()] == [
        "n01440764/0.png",
        "n01443537/0.png",
    ]
    for key in ("vtab/dtd", "coco", "misc/winogavil", "pairs"):
        looked_for = find_task(key, [one_of_each], "train")
        assert isinstance(looked_for, list), key
    train = one_of_each / "wds_vtab-dtd_test" / "train"
    write_tar(train / "0.tar", labelled([1, 1, 0]))
    (train / "nshards.txt").write_text("1")
    assert [s.label for s in find_task("vtab/dtd", [one_of_each], "train").samples()] == [1, 1, 0]


def test_a_damaged_set_is_not_an_absent_one(one_of_each):
    """Skipping it would hide that something is wrong."""
    (one_of_each / "wds_vtab-dtd_test" / "test" / "nshards.txt").write_text("many")
    with pytest.raises(ConfigError, match="nshards.txt"):
        find_task("vtab/dtd", [one_of_each])


def test_a_locked_folder_costs_one_line(one_of_each, monkeypatch):
    """Root, as whom tests may run, can read any folder: the refusal is played."""

    def refuse(folder, **_):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(find, "open_captions", refuse)
    with pytest.raises(ConfigError, match="^data: .*sets: cannot be read: Permission denied$"):
        find_sets(one_of_each)


def test_real_sets(data_root):
    """The eight real sets, by folder and by name."""
    names = ["caltech101", "clothing10", "coco_cc_retrieval", "emoji_category"]
    names += ["emoji_retrieval", "fashion_mnist", "flowers5", "grocery"]
    assert [s.name for s in find_sets(data_root / "zeroshot")] == names
    found = find_task("vtab/caltech101", [data_root / "zeroshot"])
    assert (found.name, len(found.class_names)) == ("vtab/caltech101", 99)
