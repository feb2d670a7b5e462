"""Reading by id: the declared members, nothing else, and a reason for everything that cannot be used."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest

from kd_accel.data import shards
from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.shards import TarSource
from kd_accel.data.source import BadSample
from kd_accel.schema import ConfigError


def reader(folder, caption="txt"):
    return TarSource(expand_shards(str(folder)), captions=[caption])


def test_a_sample_is_what_was_packed(make_shards, jpeg):
    """Id, key, image bytes and caption, from the first and the last row of every shard."""
    read = reader(make_shards([3, 0, 2]))
    for i in [0, 2, 3, 4]:
        sample = read.read(i)
        assert (sample.id, sample.key, sample.image) == (i, f"{i:06d}", jpeg(i))
        assert sample.captions == (f"caption {i}",)
    assert [Path(read.shard(i)).name for i in (2, 3)] == ["0000.tar", "0002.tar"]


def test_captions_are_stripped_unicode(tmp_path, write_tar):
    """UTF-8 text without the line end that most packers leave."""
    build_index([write_tar(tmp_path / "0.tar", [("a", {"jpg": b"1", "cap": " caf\u00e9 \n".encode()})])])
    assert reader(tmp_path, "cap").read(0).captions == ("caf\u00e9",)


def test_every_image_extension_is_read_and_the_first_one_counts(tmp_path, write_tar):
    """.jpg, .jpeg, .png and .webp in any case; other members are never touched."""
    kinds = ["jpg", "jpeg", "png", "webp", "JPG"]
    samples = [(f"{i}", {"pyd": b"?", kind: kind.encode(), "txt": b"t"}) for i, kind in enumerate(kinds)]
    samples.append(("both", {"png": b"png", "jpg": b"jpg", "txt": b"t"}))
    build_index([write_tar(tmp_path / "0.tar", samples)])
    read = reader(tmp_path)
    assert [read.read(i).image.decode() for i in range(6)] == [*kinds, "jpg"]


@pytest.mark.parametrize("kind", ["no caption", "no image", "empty caption", "not UTF-8"])
def test_unusable_members_say_why(make_shards, broken, kind):
    """Each kind has its reason; its neighbours are read."""
    read = reader(make_shards([3], {1: kind}))
    with pytest.raises(BadSample) as error:
        read.read(1)
    assert error.value.reason == broken[kind][1]
    assert read.read(0).id == 0
    assert read.read(2).id == 2


def test_a_tar_cut_while_training_gives_short_reads(make_shards):
    """Not fewer bytes as if they were the member."""
    folder = make_shards([2])
    read = reader(folder)
    os.truncate(folder / "0000.tar", read.index.offsets[1, 0] + 7)
    assert read.read(0).id == 0
    with pytest.raises(BadSample) as error:
        read.read(1)
    assert error.value.reason == f"short read: 7 of {read.index.sizes[1, 0]} bytes of the image"


def test_a_reader_that_has_read_can_be_pickled(make_shards):
    """Workers that are spawned get a copy without open files, which opens its own."""
    read = reader(make_shards([2, 2]))
    samples = [read.read(i) for i in (0, 3)]
    pickled = pickle.dumps(read)
    for file in read._files.values():  # as another process would find them
        os.close(file)
    copy = pickle.loads(pickled)
    assert [copy.read(i) for i in (0, 3)] == samples


def test_few_shards_are_open_at_a_time(make_shards, monkeypatch):
    """Thousands of shards stay below the limit on open files, and every one of them stays readable."""
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    read = reader(make_shards([1] * 5))
    before = len(os.listdir("/proc/self/fd"))
    for i in [0, 1, 0, 2, 3, 4, 0, 1]:
        assert read.read(i).id == i
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_labels_are_read_where_they_are_wanted(tmp_path, write_tar):
    """A whole number, with or without white space around it; nobody asks for one when there is no data.label."""
    build_index([write_tar(tmp_path / "0.tar", [("a", {"jpg": b"1", "txt": b"t", "cls": b" 7\n"})])])
    paths = expand_shards(str(tmp_path))
    assert TarSource(paths, captions=["txt"], label="cls").read(0).label == 7
    assert reader(tmp_path).read(0).label is None


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (b"cat", "label is not a whole number: 'cat'"),
        (b"-1", "'-1'"),
        (b"", "''"),
        (b"9223372036854775808", "'9223372036854775808'"),  # 2^63: no int64
        (b"9" * 5000, "'99999999999999999999'"),  # more digits than Python turns into a number
        (None, "label member is missing"),
    ],
)
def test_a_sample_without_a_usable_label_is_bad(tmp_path, write_tar, label, reason):
    members = {"jpg": b"1", "txt": b"t"}
    given = {} if label is None else {"cls": label}
    build_index([write_tar(tmp_path / "0.tar", [("a", members | given), ("b", members | {"cls": b"0"})])])
    paths = expand_shards(str(tmp_path))
    with pytest.raises(BadSample, match=reason):
        TarSource(paths, captions=["txt"], label="cls").read(0)


def test_shards_without_any_label(make_shards):
    """The key to change is data.label."""
    paths = expand_shards(str(make_shards([2])))
    with pytest.raises(ConfigError, match=r"data.label: no sample has a member .cls; the shards have jpg, json, txt"):
        TarSource(paths, captions=["txt"], label="cls")


def test_several_captions_and_captions_in_json(tmp_path, write_tar):
    """Each field gives its texts, a list in a json member several; a field that a sample lacks gives none."""
    info = json.dumps({"alt": ["two", " three "], "syn": "four"}).encode()
    both, one = {"jpg": b"1", "txt": b"one", "json": info}, {"jpg": b"1", "json": b'{"alt": "x", "syn": "y"}'}
    build_index([write_tar(tmp_path / "0.tar", [("a", both), ("b", one)])])
    read = TarSource(expand_shards(str(tmp_path)), captions=["txt", "json:alt"], synthetic=["json:syn"])
    assert (read.read(0).captions, read.read(0).synthetic) == (("one", "two", "three"), ("four",))
    assert (read.read(1).captions, read.read(1).synthetic) == (("x",), ("y",))


def test_what_is_not_wanted_is_not_read(tmp_path, write_tar):
    """Without images a sample without one is as good; without captions, one without a caption."""
    build_index([write_tar(tmp_path / "0.tar", [("a", {"jpg": b"1"}), ("b", {"txt": b"t"})])])
    paths = expand_shards(str(tmp_path))
    assert TarSource(paths).read(0).captions == ()
    assert TarSource(paths, image=False, captions=["txt"]).read(1).image is None


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (b"{", "caption: .json is not JSON with the key alt"),
        (b"[1]", "caption: .json is not JSON with the key alt"),
        (b'{"other": "t"}', "caption: .json is not JSON with the key alt"),
        (b'{"alt": [1]}', "caption: json:alt is not text"),
        (b'{"alt": []}', "caption is empty"),
        (b'{"alt": ["a", " "]}', "caption is empty"),
        (b'{"alt": ' + b"[" * 100_000, "caption: .json is not JSON with the key alt"),  # too deep for the parser
    ],
)
def test_json_without_a_caption_is_bad(tmp_path, write_tar, member, reason):
    build_index([write_tar(tmp_path / "0.tar", [("a", {"jpg": b"1", "json": member})])])
    with pytest.raises(BadSample) as error:
        TarSource(expand_shards(str(tmp_path)), captions=["json:alt"]).read(0)
    assert error.value.reason == reason
