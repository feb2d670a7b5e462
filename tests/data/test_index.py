"""The index: every member where tarfile finds it, damage named, written whole or not at all."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from kd_accel.data.index import MAX_EXTENSIONS, build_index, expand_shards, load_index
from kd_accel.data.members import IMAGE_EXTENSIONS
from kd_accel.index import run
from kd_accel.index_config import IndexConfig
from kd_accel.schema import ConfigError


def load(folder, caption="txt"):
    members = [("data.shards", IMAGE_EXTENSIONS), ("data.caption", (caption,))]
    return load_index(expand_shards(str(folder)), members)


def test_every_member_is_where_tarfile_finds_it(make_shards):
    """Offset and size of image and caption give the bytes that tarfile extracts; ids count over the shards in order."""
    folder = make_shards([3, 2])
    index = load(folder)
    assert index.starts.tolist() == [0, 3, 5]
    assert [key.decode() for key in index.keys] == [f"{i:06d}" for i in range(5)]
    for i, key in enumerate(index.keys):
        path = folder / f"{np.searchsorted(index.starts, i, 'right') - 1:04d}.tar"
        with tarfile.open(path) as tar:
            for column, extension in enumerate(["jpg", "txt"]):
                start, size = index.offsets[i, column], index.sizes[i, column]
                expected = tar.extractfile(f"{key.decode()}.{extension}").read()
                assert path.read_bytes()[start : start + size] == expected


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path, write_tar):
    """A key has its folder and ends at the first dot of the name; extensions are lower case."""
    wds = pytest.importorskip("webdataset")
    a, b = {"JPG": b"1", "cls.txt": b"2", "txt": b"3"}, {"png": b"4", "txt": b"5"}
    path = write_tar(tmp_path / "0.tar", [("a.b/x", a), ("c/x", b), ("x", b), ("y", {"jpg": b"6", "txt": b"7"})])
    build_index([path])
    theirs = list(wds.WebDataset([str(path)], shardshuffle=False, empty_check=False))
    index = load(tmp_path)
    assert [key.decode() for key in index.keys] == [sample["__key__"] for sample in theirs]
    data = path.read_bytes()
    for sample, offsets, sizes in zip(theirs, index.offsets, index.sizes, strict=True):
        image, caption = (data[start : start + size] for start, size in zip(offsets, sizes, strict=True))
        assert (image, caption) == (sample.get("jpg", sample.get("png")), sample["txt"])


def test_an_absent_member_is_marked(make_shards):
    """A sample without caption keeps its id; the caption's offset is -1."""
    index = load(make_shards([3], {1: "no caption"}))
    assert (index.offsets[:, 1] < 0).tolist() == [False, True, False]
    assert (index.offsets[:, 0] >= 0).all()


def test_links_and_sparse_members_are_no_samples(tmp_path, write_tar):
    """Only plain files have their bytes in the tar: a symbolic link to a file outside is never followed."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [("a.jpg", tarfile.SYMTYPE), ("a.txt", tarfile.REGTYPE), ("b.jpg", tarfile.REGTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info, io.BytesIO())
    build_index([path])
    assert load(tmp_path).offsets[:, 0].tolist()[0] == -1


def test_shards_are_expanded_in_order(make_shards):
    """Brace ranges, folders and lists of both give paths in the order in which they are written."""
    folder = make_shards([1, 1, 1], index=False)
    names = [folder / f"{i:04d}.tar" for i in range(3)]
    assert expand_shards(str(folder)) == names
    assert expand_shards(f"{folder}/{{0000..0001}}.tar") == names[:2]
    assert expand_shards([f"{folder}/0002.tar", f"{folder}/000{{0,1}}.tar"]) == [names[2], names[0], names[1]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["{0000..0003}.tar"], "2 of 4 shards do not exist, the first is .*0002.tar"),
        (["0000.tar", "000{0,1}.tar"], "0000.tar is given twice"),
        (["", "0001.tar"], "0001.tar is given twice"),
        (["0000.tar", "empty/../0000.tar"], "0000.tar is given twice"),
        (["empty"], "the folder .*empty holds no .tar"),
        (["0000.tar.gz"], "is not a .tar; a compressed tar must be unpacked"),
        (["nowhere"], "nowhere: no such folder; give a folder of .tar files"),
        (["{0000..0003.tar"], "unbalanced braces"),
        (["pipe:cat 0000.tar"], "do not exist"),
        ([], "names no shard"),
    ],
)
def test_wrong_shards_are_named(make_shards, entries, message):
    """A shard that is missing, given twice or no tar stops with data.shards and its name; no command is ever run."""
    folder = make_shards([1, 1], index=False)
    (folder / "empty").mkdir()
    (folder / "0000.tar.gz").touch()
    with pytest.raises(ConfigError, match=f"data.shards: .*{message}"):
        expand_shards([os.path.join(folder, entry) for entry in entries])


def test_a_truncated_tar_says_how_many_samples_are_whole(make_shards):
    """Cut inside a member, inside a header, or between two samples: the tar and the whole samples before are named."""
    folder = make_shards([3], index=False)
    path = folder / "0000.tar"
    with tarfile.open(path) as tar:
        cuts = [(member.offset_data + member.size // 2, member.offset + 100, member.offset) for member in tar][3]
    whole = path.read_bytes()
    for cut in cuts:  # all in the image of the second sample, or just before it
        path.write_bytes(whole[:cut])
        with pytest.raises(ConfigError, match=r"0000.tar: not a whole tar, it breaks off after [01] whole samples"):
            build_index([path])
        assert not path.with_suffix(".idx.npz").exists()
    path.write_bytes(whole[: cuts[0]])
    with pytest.raises(ConfigError, match="after 1 whole samples"):
        build_index([path])


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100])
def test_what_is_no_tar_is_refused(tmp_path, content):
    """An error page saved as .tar is the user's mistake, not a traceback."""
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ConfigError, match=r"0.tar: not a whole tar"):
        build_index([tmp_path / "0.tar"])


def test_a_member_given_twice_is_refused(tmp_path, write_tar):
    """Two members of one name in one sample leave open which one counts."""
    path = write_tar(tmp_path / "0.tar", [("a", {"jpg": b"1"}), ("a", {"jpg": b"2"})])
    with pytest.raises(ConfigError, match=r"0.tar: a.jpg is there twice"):
        build_index([path])


def test_names_with_dots_are_refused_before_they_fill_the_memory(tmp_path, write_tar):
    """One extension per sample would make the index grow with the square of the samples."""
    path = write_tar(tmp_path / "0.tar", [(f"{i}", {f"{i}.jpg": b"1"}) for i in range(MAX_EXTENSIONS + 1)])
    with pytest.raises(ConfigError, match=f"{MAX_EXTENSIONS + 1} different extensions"):
        build_index([path])


def test_a_second_call_reads_no_tar(make_shards):
    """Shards that are indexed and unchanged are skipped, and their sidecars stay untouched."""
    folder = make_shards([2, 3])
    sidecars = sorted(folder.glob("*.npz"))
    before = [sidecar.stat().st_ino for sidecar in sidecars]
    assert build_index(expand_shards(str(folder))) == (0, 5)
    assert [sidecar.stat().st_ino for sidecar in sidecars] == before


def test_a_replaced_tar_is_indexed_again(make_shards, write_tar, jpeg):
    """Also one of the same size, which padding makes likely: a tar newer than its index is read again."""
    folder = make_shards([2, 2])
    path = folder / "0000.tar"
    size = path.stat().st_size
    write_tar(path, [(key, {"jpg": jpeg(0), "txt": b"changed"}) for key in ("a", "b")])
    assert path.stat().st_size == size
    newer = path.with_suffix(".idx.npz").stat().st_mtime_ns + 1
    os.utime(path, ns=(newer, newer))
    assert build_index(expand_shards(str(folder))) == (1, 4)
    assert load(folder).keys.tolist()[:2] == [b"a", b"b"]


def test_an_unreadable_index_is_named_and_written_anew(make_shards):
    """A damaged sidecar stops the loader with the way out, and the next index call heals it."""
    folder = make_shards([2])
    sidecar = folder / "0000.idx.npz"
    sidecar.write_bytes(sidecar.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"0000.idx.npz: cannot be read .* run kd-accel index"):
        load(folder)
    assert build_index([folder / "0000.tar"]) == (1, 2)
    assert load(folder).num_samples == 2


def test_no_pickle_is_ever_loaded(make_shards, tmp_path):
    """An index that holds a pickled object is refused and its code does not run."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    folder = make_shards([2])
    np.savez(folder / "0000.idx.npz", **dict.fromkeys(["keys", "tar_bytes"], np.array([Attack()], dtype=object)))
    with pytest.raises(ConfigError, match="cannot be read"):
        load(folder)
    assert not (tmp_path / "owned").exists()


def test_a_failed_write_leaves_the_old_index(make_shards):
    """When the disk is full in the middle of a write, what was there stays whole and no temporary file is left."""
    folder = make_shards([2])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    newer = (folder / "0000.idx.npz").stat().st_mtime_ns + 1
    os.utime(folder / "0000.tar", ns=(newer, newer))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # bytes; a full disk that needs no mount
    try:
        with pytest.raises(OSError, match="File too large"):
            build_index([folder / "0000.tar"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_manifest_lists_every_indexed_shard(make_shards):
    """Shards, samples and bytes of the folder; shards of an earlier call stay listed."""
    folder = make_shards([2, 3], index=False)
    for name in ["0001.tar", "0000.tar"]:
        build_index([folder / name])
    manifest = json.loads((folder / "manifest.json").read_text())
    tars = [folder / "0000.tar", folder / "0001.tar"]
    rows = [{"file": t.name, "samples": n, "bytes": t.stat().st_size} for t, n in zip(tars, [2, 3], strict=True)]
    assert manifest == {"samples": 5, "shards": rows}


def test_a_missing_index_says_what_to_run(make_shards):
    """The way out is in the message."""
    folder = make_shards([2], index=False)
    with pytest.raises(ConfigError, match=f"0000.tar: has no index: run kd-accel index {folder}"):
        load(folder)


def test_a_tar_truncated_after_indexing_is_refused(make_shards):
    """The loader starts on no tar that has another size than when it was indexed."""
    folder = make_shards([2, 2])
    size = (folder / "0001.tar").stat().st_size
    os.truncate(folder / "0001.tar", size - 512)
    with pytest.raises(ConfigError, match=f"0001.tar: has {size - 512:,} bytes but had {size:,}"):
        load(folder)


def test_shards_without_samples_are_refused(make_shards):
    """Empty tars are whole tars, but nothing can be trained on them."""
    folder = make_shards([0, 0])
    with pytest.raises(ConfigError, match="data.shards: no sample in 2 shards"):
        load(folder)


def test_an_empty_shard_among_others_holds_no_id(make_shards):
    """Ids go on across it."""
    assert load(make_shards([2, 0, 1])).starts.tolist() == [0, 2, 2, 3]


def test_a_wrong_caption_extension_is_named(make_shards):
    """When no sample has the member, the key and the extensions that are there are named."""
    with pytest.raises(ConfigError, match=r"data.caption: no sample has a member .caption; .* jpg, json, txt"):
        load(make_shards([2]), caption="caption")


def test_symlinked_tars_are_indexed_beside_the_link(make_shards, tmp_path):
    """The way out of a folder that cannot be written: the sidecar is written where the link is."""
    folder = make_shards([2, 2], index=False)
    links = tmp_path / "links"
    links.mkdir()
    for tar in folder.glob("*.tar"):
        (links / tar.name).symlink_to(tar)
    build_index(expand_shards(str(links)))
    assert load(links).num_samples == 4
    assert sorted(path.suffix for path in folder.iterdir()) == [".tar", ".tar"]


@pytest.fixture
def read_only(make_shards):
    """An indexed folder that this process cannot write, root or not."""
    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which other users cannot enter
        folder, user = Path(name) / "shards", os.geteuid()
        shutil.copytree(make_shards([2, 2]), folder)
        os.chmod(name, 0o755)
        os.chmod(folder, 0o555)
        if user == 0:
            os.seteuid(65534)  # nobody: root writes everywhere
        yield folder
        os.seteuid(user)
        os.chmod(folder, 0o755)


def test_a_read_only_folder_names_the_way_out(read_only):
    """When there is something to index; a read-only folder whose tars all are indexed is as good as any."""
    paths = expand_shards(str(read_only))
    assert build_index(paths) == (0, 4)
    newer = (read_only / "0001.idx.npz").stat().st_mtime_ns + 1
    user = os.geteuid()
    os.seteuid(os.getuid())
    os.utime(paths[1], ns=(newer, newer))
    os.seteuid(user)
    with pytest.raises(ConfigError, match="cannot be written .*Permission denied.*: copy or symlink the tars"):
        build_index(paths)


def test_the_verb_says_what_there_is(make_shards, capsys):
    """One sentence: samples, shards, what was done."""
    folder = make_shards([2, 3], index=False)
    build_index([folder / "0000.tar"])
    run(IndexConfig(shards=str(folder)))
    assert capsys.readouterr().out == "5 samples in 2 shards: 1 indexed now, 1 already were.\n"
