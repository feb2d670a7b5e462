"""Tables: every row exactly as it is written, whatever the format; a reason for each one that cannot be used."""

from __future__ import annotations

import json
import os
import pickle
import tarfile

import pyarrow as pa
import pytest
from pyarrow import parquet

from kd_accel.data import rows, tables
from kd_accel.data.source import BadSample
from kd_accel.data.tables import open_table
from kd_accel.schema import ConfigError

HARD = ["NA", "", '"quoted"', 'half " a quote', "it's, with a comma", "caf\u00e9 \U0001f600", "null", "1.50"]


@pytest.fixture
def photos(tmp_path, jpeg):
    """8 pictures 0.jpg, 1.jpg, ..."""
    for i in range(len(HARD)):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    return tmp_path


def captions(source) -> list[str]:
    """The only caption of each sample; of an empty one the reason for which it is bad."""
    found = []
    for i in range(source.num_samples):
        try:
            (caption,) = source.read(i).captions
        except BadSample as bad:
            caption = bad.reason
        found.append(caption)
    return found


EXPECTED = [caption or "caption is empty" for caption in HARD]


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv"])
def test_tab_separated_text_survives_exactly(photos, jpeg, name):
    """open_clip's file: quotes are text, NA is a caption, a row is a line; .csv is sniffed by its header."""
    lines = ["filepath\ttitle", *(f"{i}.jpg\t{caption}" for i, caption in enumerate(HARD))]
    (photos / name).write_text("\n".join(lines) + "\n")
    source = open_table(str(photos / name))
    assert captions(source) == EXPECTED
    assert source.num_samples == len(HARD)
    sample = source.read(2)
    assert (sample.id, sample.key, sample.image, sample.label) == (2, "2.jpg", jpeg(2), None)
    assert source.shard(2) == str(photos / name)


def test_comma_separated_text_is_quoted_as_rfc_4180(photos, monkeypatch):
    """Commas, line ends and doubled quotes inside quotes; no matter where a block of the file ends."""
    lines = ['0.jpg,"a, ""b""\nc"', "1.jpg,NA", '2.jpg,""', "3.jpg,plain"] * 5
    (photos / "pairs.csv").write_text("\n".join(["filepath,title", *lines]))
    for block in (40, 41, 47, 53, 10_000):
        monkeypatch.setattr(tables, "BLOCK_BYTES", block)
        found = captions(open_table(str(photos / "pairs.csv")))
        assert found == ['a, "b"\nc', "NA", "caption is empty", "plain"] * 5


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_typed_tables(photos, suffix, jpeg):
    """Any column names, several captions from a list and from several columns, generated ones apart, whole labels."""
    table = [
        {"picture": "0.jpg", "raw": [" a ", "", "b"], "more": "c", "fake": ["f", "g"], "cls": 3, "x": None},
        {"picture": "1.jpg", "raw": None, "more": "d", "fake": None, "cls": 9, "x": None},
        {"picture": "2.jpg", "raw": [], "more": None, "fake": [], "cls": None, "x": None},
    ]
    path = photos / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(map(json.dumps, [*table, {"x": [1, "of any type"], "picture": "3.jpg"}])))
    else:
        parquet.write_table(pa.Table.from_pylist(table), path)
    source = open_table(str(path), image="picture", caption=["raw", "more"], synthetic="fake", label="cls")
    first, second = source.read(0), source.read(1)
    assert (first.captions, first.synthetic, first.label) == (("a", "b", "c"), ("f", "g"), 3)
    assert (second.captions, second.synthetic, second.label) == (("d",), (), 9)
    assert second.image == jpeg(1)
    with pytest.raises(BadSample, match="caption is empty"):
        source.read(2)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_key_inside_a_value(photos, suffix):
    """COLUMN:KEY reads nested values, and a wrong KEY has the nearest one in its error."""
    table = [{"filepath": "0.jpg", "json": {"text": {"long": ["a", "b"]}}}]
    path = photos / f"pairs.{suffix}"
    path.write_text(json.dumps(table[0]) + "\n")
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(table), path)
    assert open_table(str(path), caption="json:text:long").read(0).captions == ("a", "b")
    with pytest.raises(ConfigError, match=r"data.caption: .* has no 'json:text:lang'; did you mean 'long'\?"):
        open_table(str(path), caption="json:text:lang")


def test_conceptual_captions_without_images(tmp_path):
    """No header, text only: columns are named by their numbers. The key of a row is its number."""
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text('a "dog"\thttp://x/1.jpg\nNA\thttp://x/2.jpg\n')
    source = open_table(str(path), image=None, caption="0")
    assert [(s.key, s.image, s.captions) for s in map(source.read, (0, 1))] == [
        ("0", None, ('a "dog"',)),
        ("1", None, ("NA",)),
    ]
    with pytest.raises(ConfigError, match="data.caption: .* has no column '2'; set data.caption to one of 0, 1"):
        open_table(str(path), image=None, caption="2")


def test_pictures_that_nobody_wants_to_see(tmp_path):
    """They name the rows and need not be there; a table without their column has numbers."""
    (tmp_path / "pairs.csv").write_text("filepath,title\na.jpg,one\nb.jpg,two\n")
    (tmp_path / "texts.csv").write_text("title\none\ntwo\n")
    for name, keys in (("pairs.csv", ["a.jpg", "b.jpg"]), ("texts.csv", ["0", "1"])):
        source = open_table(str(tmp_path / name), images=False)
        samples = [source.read(i) for i in range(source.num_samples)]
        assert [(s.key, s.image, s.captions) for s in samples] == [(keys[0], None, ("one",)), (keys[1], None, ("two",))]
    assert open_table(str(tmp_path / "pairs.csv"), image=None).key(1) == "1"
    assert open_table(str(tmp_path / "pairs.csv"), caption=None, images=False).num_samples == 2


@pytest.mark.parametrize("text", [b'one\n\n  \ntwo \r\n"three"', b'one\ntwo\n"three"\n'])
def test_lines_of_text(tmp_path, text):
    """A caption each; empty lines are none, with or without an end of the last line."""
    path = tmp_path / "captions.txt"
    path.write_bytes(text)
    source = open_table(str(path))
    assert captions(source) == ["one", "two", '"three"']
    assert source.read(0).image is None


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.txt"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path, name):
    """Windows writes one at the start of a file; line ends may be Windows' too."""
    text = {"x.tsv": "title\r\na\r\nb\r\n", "x.jsonl": '{"title": "a"}\r\n{"title": "b"}\r\n', "x.txt": "a\r\nb\r\n"}
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.get(name, text["x.tsv"]).encode())
    assert captions(open_table(str(tmp_path / name), **({} if name == "x.txt" else {"image": None}))) == ["a", "b"]


def test_images_without_captions(photos, jpeg):
    (photos / "images.csv").write_text("path\n0.jpg\n1.jpg\n")
    sample = open_table(str(photos / "images.csv"), image="path", caption=None).read(1)
    assert (sample.key, sample.image, sample.captions) == ("1.jpg", jpeg(1), ())


def test_several_files_are_one_table(tmp_path, jpeg):
    """Ids run on; relative paths start from the folder of the row's own file, or from image_root."""
    for folder, numbers in (("a", (0, 1)), ("b", (2,))):
        (tmp_path / folder).mkdir()
        lines = [f"{i}.jpg\tcaption {i}" for i in numbers]
        (tmp_path / folder / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *lines]))
        for i in numbers:
            (tmp_path / folder / f"{i}.jpg").write_bytes(jpeg(i))
    source = open_table(f"{tmp_path}/{{a,b}}/pairs.tsv")
    assert [(source.read(i).image, source.key(i)) for i in range(3)] == [(jpeg(i), f"{i}.jpg") for i in range(3)]
    assert [source.shard(i) for i in range(3)] == [str(tmp_path / folder / "pairs.tsv") for folder in "aab"]
    moved = open_table([str(tmp_path / "b/pairs.tsv")], image_root=str(tmp_path / "b"))
    assert moved.read(0).image == jpeg(2)


def test_without_images_the_key_is_the_row_of_its_file(tmp_path):
    for name, text in (("a.txt", "one\ntwo"), ("b.txt", "three")):
        (tmp_path / name).write_text(text)
    source = open_table([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert [(source.key(i), source.shard(i)[-5:]) for i in range(3)] == [("0", "a.txt"), ("1", "a.txt"), ("0", "b.txt")]


def test_absolute_paths_and_labels_of_a_csv(photos, jpeg):
    (photos / "pairs.csv").write_text(f"filepath,title,class\n{photos}/3.jpg,three,12\n{photos}/4.jpg,four,cat\n")
    source = open_table(str(photos / "pairs.csv"), label="class")
    assert (source.read(0).image, source.read(0).label) == (jpeg(3), 12)
    with pytest.raises(BadSample, match="label is not a whole number: 'cat'"):
        source.read(1)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"gone.jpg\ta caption", "image cannot be read: 'gone.jpg' is no file"),
        (b".\ta caption", "image cannot be read: '.' is no file"),
        (b"/dev/zero\ta caption", "image cannot be read: '/dev/zero' is no file"),
        (b"0.jpg\0.png\ta caption", r"image cannot be read: '0.jpg\x00.png' is no file"),
        (b"\ta caption", "image is missing"),
        (b"0.jpg\t \t ", "caption is empty"),
        (b"0.jpg\tcaf\xe9", "row is not UTF-8"),
        (b"caf\xe9.jpg\ta caption", "row is not UTF-8"),
    ],
)
def test_an_unusable_row_says_why(photos, row, reason):
    """Its neighbours are read, and its key can be shown."""
    extra = b"\textra" if row.count(b"\t") == 1 else b""
    lines = [b"filepath\ttitle\tother", b"1.jpg\tone\t-", row + extra, b"2.jpg\ttwo\t-"]
    (photos / "pairs.tsv").write_bytes(b"\n".join(lines))
    source = open_table(str(photos / "pairs.tsv"))
    with pytest.raises(BadSample) as error:
        source.read(1)
    assert error.value.reason == reason
    assert source.key(1).startswith(row[:3].decode("utf-8", "backslashreplace").partition("\t")[0])
    assert [source.read(i).captions for i in (0, 2)] == [("one",), ("two",)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(photos):
    (photos / "1.jpg").chmod(0)
    (photos / "pairs.tsv").write_text("filepath\ttitle\n0.jpg\ta\n1.jpg\tb\n")
    with pytest.raises(BadSample, match="image cannot be read: '1.jpg': Permission denied"):
        open_table(str(photos / "pairs.tsv")).read(1)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        (
            "x.tsv",
            "path\ttitle\n",
            {},
            "data.image: .*x.tsv has no column 'filepath'; .* to one of path, title or null",
        ),
        ("x.tsv", "filepath\ttitel\n", {}, "data.caption: .* has no column 'title'; did you mean 'titel'.* or null"),
        (
            "x.csv",
            "filepath,title\n",
            {"label": "cls"},
            "data.label: .*'cls'; set data.label to one of filepath, title$",
        ),
        ("x.csv", "filepath,title\n", {}, "data.table: .*x.csv holds no samples"),
        ("x.csv", "", {}, "data.table: .*x.csv cannot be read: Empty CSV file"),
        ("x.csv", "filepath,title\na,b\nc\n", {}, "data.table: .*Expected 2 columns, got 1: c"),
        ("x.jsonl", '{"filepath": "a"}\n{"b"\n', {}, "data.table: .*x.jsonl cannot be read"),
        (
            "x.jsonl",
            '{"filepath": "a", "title": 7}\n',
            {},
            "data.caption: .* holds int64, expected text or lists of text",
        ),
        ("x.jsonl", '{"filepath": "a", "title": null}\n', {}, "data.caption: .* holds null, expected text"),
        (
            "x.jsonl",
            '[{"filepath": "a"}]\n',
            {},
            "data.table: .* lines that are no objects; a list of objects is .json",
        ),
        ("x.jsonl", '{"title": "a"}\n{"title": ["b"]}\n', {"image": None}, "data.table: .*x.jsonl cannot be read"),
        ("x.parquet", "no parquet", {}, "data.table: .*x.parquet cannot be read"),
        ("x.xlsx", "", {}, "data.table: .*unknown extension '.xlsx'; one of .csv, .tsv, .jsonl, .parquet, .json, .txt"),
        ("x.tsv", "filepath\ttitle\nno.jpg\tb\n", {}, "data.table: none of the first 1 images of .*no.jpg.*image_root"),
        ("x.tsv", "a\tb\n", {"image": None, "caption": None}, "data.image, data.caption: both are null"),
    ],
)
def test_mistakes_in_one_line(tmp_path, name, text, options, message):
    """The key to change, what the file has, and the nearest of it."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        open_table(str(tmp_path / name), **options)
    assert "\n" not in str(error.value)


def test_mistakes_in_the_list_of_files(tmp_path):
    (tmp_path / "x.tsv").write_text("filepath\ttitle\n")
    (tmp_path / "x.txt").write_text("a\n")
    for paths, message in [
        ([f"{tmp_path}/none.tsv"], "none.tsv: no such file$"),
        ([str(tmp_path)], "no such file; a folder of images is data.folder"),
        ([f"{tmp_path}/x.tsv", f"{tmp_path}/x.txt"], "one format, not .tsv and .txt"),
        ([f"{tmp_path}/x.txt", f"{tmp_path}/../{tmp_path.name}/x.txt"], "a file is given twice"),
        (f"{tmp_path}/{{x.txt", "unbalanced braces"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_table(paths)


def test_blocks_and_the_first_samples(tmp_path, monkeypatch):
    """Blocks of neighbours stand for shards; max_samples takes the first rows."""
    monkeypatch.setattr(rows, "BLOCK", 4)
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(f"caption {i}" for i in range(10)))
    assert open_table(str(path)).shard_sizes.tolist() == [4, 4, 2]
    assert open_table(str(path), max_samples=8).shard_sizes.tolist() == [4, 4]
    assert open_table(str(path), max_samples=11).num_samples == 10


def test_a_table_can_be_pickled(photos):
    """Spawned workers get a copy."""
    (photos / "pairs.tsv").write_text("filepath\ttitle\n0.jpg\ta\n1.jpg\tb\n")
    source = open_table(str(photos / "pairs.tsv"))
    assert pickle.loads(pickle.dumps(source)).read(1) == source.read(1)


def test_real_photos(data_root, tmp_path):
    """COCO's photos and captions, written as open_clip's table, come back byte by byte."""
    lines, images = ["filepath\ttitle"], []
    with tarfile.open(data_root / "zeroshot/coco_cc_retrieval/test/0.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for name in sorted(name for name in members if name.endswith(".jpg")):
        (tmp_path / name).write_bytes(members[name])
        images.append(members[name])
        lines.append(f"{name}\t{members[name[:-3] + 'txt'].decode().splitlines()[0]}")
    (tmp_path / "coco.csv").write_text("\n".join(lines))
    source = open_table(str(tmp_path / "coco.csv"))
    samples = [source.read(i) for i in range(source.num_samples)]
    assert [sample.image for sample in samples] == images
    assert [f"{sample.key}\t{sample.captions[0]}" for sample in samples] == lines[1:]
    assert len(samples) == 83
