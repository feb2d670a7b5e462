"""The layouts of evaluation sets: what is found, in which order, and what is said about a broken one."""

from __future__ import annotations

import tarfile

import pytest
import torch

from kd_accel.evals.features import ImageBatches, deal
from kd_accel.evals.find import find_sets
from kd_accel.schema import ConfigError


def test_a_zero_shot_set(tmp_path, write_benchmark, labelled):
    """Classes, templates and rows come in the order of their files; rows count through the tars."""
    samples = list(labelled([1, 0, 2, 1]).items())
    [found] = find_sets(str(write_benchmark(tmp_path / "things", dict(samples[:3]), dict(samples[3:]), num_classes=3)))
    assert (found.name, found.kind) == ("things", "zero_shot")
    assert found.class_names == ("thing 0", "thing 1", "thing 2")
    assert found.templates == ("a photo of a {c}.", "{c}")
    assert [(s.key, s.label) for s in found.samples()] == [("s0000", 1), ("s0001", 0), ("s0002", 2), ("s0003", 1)]


def test_without_a_type_it_is_classification(tmp_path, write_benchmark, labelled):
    """As CLIP_benchmark has it: DataComp's folders bring no dataset_type.txt."""
    folder = write_benchmark(tmp_path / "things", labelled([0]), num_classes=1)
    (folder / "dataset_type.txt").unlink()
    assert find_sets(folder)[0].kind == "zero_shot"


def test_a_retrieval_set_has_a_caption_per_line(tmp_path, write_benchmark, captioned):
    """Empty lines are no captions."""
    samples = captioned([2, 1])
    samples["s0001"]["txt"] = b"\n  one caption  \n\n"
    [found] = find_sets(write_benchmark(tmp_path / "pairs", samples))
    assert found.kind == "retrieval"
    assert [s.captions for s in found.samples()] == [
        ("caption 0 of image 0", "caption 1 of image 0"),
        ("one caption",),
    ]


def test_a_folder_of_tars_has_a_caption_per_image(tmp_path, write_tar, captioned):
    """Image-caption tars as for training: the whole text is the caption; other members are not read."""
    samples = captioned([2])
    samples["s0000"]["json"] = b"not json"
    write_tar(tmp_path / "val" / "00000.tar", samples)
    (tmp_path / "val" / "._00000.tar").write_bytes(b"macOS leaves this")
    [found] = find_sets(tmp_path / "val")
    [sample] = found.samples()
    assert (found.name, found.kind) == ("val", "retrieval")
    assert sample.captions == ("caption 0 of image 0\ncaption 1 of image 0",)


def test_a_folder_of_sets(tmp_path, write_benchmark, write_tar, labelled, captioned):
    """Every subfolder that holds a set, sorted by name; others are passed over."""
    write_benchmark(tmp_path / "all" / "b", labelled([0]), num_classes=1)
    write_benchmark(tmp_path / "all" / "c", captioned([1]))
    write_tar(tmp_path / "all" / "a" / "0.tar", captioned([1]))
    (tmp_path / "all" / "downloads").mkdir()
    assert [(s.name, s.kind) for s in find_sets(tmp_path / "all")] == [
        ("a", "retrieval"),
        ("b", "zero_shot"),
        ("c", "retrieval"),
    ]


def test_sets_of_one_name_are_told_apart(tmp_path, write_tar, captioned):
    """x/val and y/val must not be one row of a report."""
    folders = [write_tar(tmp_path / name / "val" / "0.tar", captioned([1])).parent for name in "xy"]
    assert [s.name for s in find_sets(folders)] == ["x/val", "y/val"]


def test_keys_with_folders_and_capital_extensions(tmp_path, write_tar, picture):
    """A key is everything up to the first dot of the name, and two folders of a tar may share names."""
    samples = {f"{folder}/0": {"PNG": picture(0), "txt": folder.encode()} for folder in ("a.b", "c")}
    write_tar(tmp_path / "set" / "0.tar", samples)
    assert [(s.key, s.captions) for s in find_sets(tmp_path / "set")[0].samples()] == [
        ("a.b/0", ("a.b",)),
        ("c/0", ("c",)),
    ]


def break_folder(folder, what):
    match what:
        case "no nshards":
            (folder / "test/nshards.txt").unlink()
        case "odd nshards":
            (folder / "test/nshards.txt").write_text("two")
        case "no tar":
            (folder / "test/0.tar").unlink()
        case "no templates":
            (folder / "zeroshot_classification_templates.txt").unlink()
        case "no placeholder":
            (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {}.")
        case "no classes":
            (folder / "classnames.txt").unlink()
        case "empty class":
            (folder / "classnames.txt").write_text("one\n\nthree\n")
        case "other type":
            (folder / "dataset_type.txt").write_text("multilabel")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no nshards", "test/nshards.txt"),
        ("odd nshards", "number of tars, got 'two'"),
        ("no tar", "test/0.tar: no such file"),
        ("no templates", "zeroshot_classification_templates.txt"),
        ("no placeholder", "placeholder {c}"),
        ("no classes", "classnames.txt"),
        ("empty class", "one class name per line"),
        ("other type", "classification or retrieval, got 'multilabel'"),
    ],
)
def test_a_bad_folder_says_what_is_wrong(tmp_path, write_benchmark, labelled, what, said):
    """A ConfigError names the file and what it should hold."""
    folder = write_benchmark(tmp_path / "set", labelled([0, 1, 2]), num_classes=3)
    break_folder(folder, what)
    with pytest.raises(ConfigError) as error:
        find_sets(folder)
    assert said in str(error.value)


def test_a_folder_without_a_set_says_what_was_looked_for(tmp_path):
    """Also when the folder does not exist."""
    with pytest.raises(ConfigError, match="no such folder"):
        find_sets(tmp_path / "absent")
    (tmp_path / "some" / "notes").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"looked for dataset_type.txt, .*\*.tar"):
        find_sets(tmp_path / "some")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"cls": b"3"}, "s0001.cls is class 3, .*classnames.txt names 0..2"),
        ({"cls": b"-1"}, "s0001.cls: expected a class index"),
        ({"cls": b"cat"}, "s0001.cls: expected a class index"),
        ({"txt": b"a caption"}, "'s0001' has no member .cls"),
    ],
)
def test_a_wrong_label_names_its_sample(tmp_path, write_benchmark, labelled, picture, members, said):
    """A class that the set does not have, no number, no label at all."""
    samples = labelled([0, 1, 2]) | {"s0001": {"png": picture(1), **members}}
    [found] = find_sets(write_benchmark(tmp_path / "set", samples, num_classes=3))
    with pytest.raises(ConfigError, match=said):
        found.samples()


@pytest.mark.parametrize(
    ("text", "said"), [(b" \n", "s0001.txt holds no caption"), (b"caf\xe9", "s0001.txt is not UTF-8")]
)
def test_a_wrong_caption_names_its_sample(tmp_path, write_benchmark, captioned, text, said):
    """No caption, and bytes that are no text."""
    samples = captioned([1, 1])
    samples["s0001"]["txt"] = text
    with pytest.raises(ConfigError, match=said):
        find_sets(write_benchmark(tmp_path / "set", samples))[0].samples()


def test_an_empty_set_is_an_error(tmp_path, write_benchmark):
    """A tar without samples gives no metric."""
    [found] = find_sets(write_benchmark(tmp_path / "set", {}))
    with pytest.raises(ConfigError, match="no samples in its 1 tars"):
        found.samples()


@pytest.mark.parametrize("past", [0, 100, 512, 600])
def test_a_cut_tar_is_an_error(tmp_path, write_benchmark, captioned, past):
    """Cut before, in, at the end of, and after a member's header: tarfile misses the first two."""
    folder = write_benchmark(tmp_path / "set", captioned([1, 1, 1]))
    path = folder / "test" / "0.tar"
    with tarfile.open(path) as tar:
        second_sample = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[: second_sample + past])
    with pytest.raises(ConfigError, match=r"0\.tar: not a whole tar"):
        find_sets(folder)[0].samples()


def test_every_row_is_dealt_once():
    """Batches cover the rows in order, the last one is short, and none is empty."""
    [mine] = deal(10, 4)  # one process
    assert [list(batch) for batch in mine] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_batch_holds_what_the_model_sees(encoder, tmp_path, write_benchmark, captioned, picture):
    """Rows, views and the unreadable ones of a batch; a batch may be unreadable altogether."""
    from kd_accel.data.transforms import decode, eval_view

    samples = captioned([1, 1, 1])
    samples["s0000"]["png"] = samples["s0001"]["png"] = picture(0)[:50]
    found = find_sets(write_benchmark(tmp_path / "set", samples))[0]
    batches = ImageBatches(found, found.samples(), [range(0, 1), range(1, 3)], encoder.image_input)
    rows, views, bad = batches[0]
    assert (rows.tolist(), tuple(views.shape), len(bad)) == ([], (0, 3, 32, 32), 1)
    rows, views, bad = batches[1]
    assert rows.tolist() == [2]
    assert bad[0].startswith("s0001: image cannot be decoded")
    torch.testing.assert_close(views[0], eval_view(decode(picture(2)), encoder.image_input), rtol=0, atol=0)
