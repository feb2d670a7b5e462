"""Tars from anywhere: whatever a name, a header or an image claims, it is refused in one line, skipped or replaced."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from kd_accel.data import index
from kd_accel.data.index import build_index, read_sidecar
from kd_accel.data.transforms import decode
from kd_accel.schema import ConfigError

try:
    from kd_accel.data.source import BadSample
except ImportError:
    from kd_accel.data.source import BadSample


def tar_of(path: Path, *members: tuple[tarfile.TarInfo | str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    """Members by name or TarInfo, in order; a size that the TarInfo has is what the header claims."""
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def keys(path: Path) -> list[bytes]:
    return read_sidecar(path, "keys")[0].tolist()


def extensions(path: Path) -> dict[str, list[int]]:
    """{extension: bytes of that member in every sample, -1 where it is absent}."""
    names, offsets, sizes = read_sidecar(path, "extensions", "offsets", "sizes")
    return {name: np.where(offsets[:, i] < 0, -1, sizes[:, i]).tolist() for i, name in enumerate(names)}


def special(kind: bytes, name: str, target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_are_skipped_and_counted(tmp_path, caplog, kind):
    """Never followed, never opened; the sample that has one lacks that member."""
    path = tar_of(tmp_path / "0.tar", (special(kind, "a.jpg"), b""), ("a.txt", b"t"), ("b.jpg", b"1"), ("b.txt", b"t"))
    build_index([path])
    assert keys(path) == [b"a", b"b"]
    assert extensions(path) == {"jpg": [-1, 1], "txt": [1, 1]}
    assert "0.tar: 1 members are no plain files and are skipped, the first is 'a.jpg'" in caplog.text


@pytest.mark.parametrize("name", ["../../up.jpg", "/abs/up.jpg", "a/../../../up.jpg", "C:\\up.jpg"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    """Names are only names here: nothing is unpacked, and the index lies beside the tar."""
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    path = tar_of(folder / "0.tar", (name, b"1"))
    build_index([path])
    assert keys(path) == [name.removesuffix(".jpg").encode()]
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {"in/here/0.tar", "in/here/0.idx.npz", "in/here/manifest.json"}


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "npy"])
def test_no_member_is_ever_unpickled(tmp_path, extension):
    """webdataset's own decoder loads .pyd and .pickle; here the bytes of a member are text or an image."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    attack = pickle.dumps(Attack())
    path = tar_of(tmp_path / "0.tar", (f"a.{extension}", attack), ("a.jpg", attack))
    build_index([path])
    with pytest.raises(BadSample, match="image cannot be decoded"):
        decode(attack)
    assert not (tmp_path / "owned").exists()


def pax(tar: Path, **headers: str) -> Path:
    """A tar of one image with these pax headers, and a second one."""
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = headers
    return tar_of(tar, (info, b"123"), ("b.jpg", b"45"), format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize("name", ["a\0b.jpg", "a.jpg\0", "a\n.jpg", "\x1b[2Ja.jpg", "x" * 2000 + ".jpg"])
def test_names_that_nobody_gives_are_skipped(tmp_path, caplog, name):
    """NUL, which numpy drops at an end; what writes to a terminal; one long enough to make the table of keys huge."""
    path = pax(tmp_path / "0.tar", path=name)
    build_index([path])
    assert keys(path) == [b"b"]
    assert "1 members are no plain files and are skipped" in caplog.text
    assert "\0" not in caplog.text
    assert "\x1b" not in caplog.text


@pytest.mark.parametrize("size", ["-1", "-1024", "1000000", "9" * 30, "9" * 5000])
def test_sizes_of_pax_are_not_believed(tmp_path, size):
    """Negative ones have sent tarfile round in circles (CVE-2025-8194), and numbers may be too long to be read."""
    with pytest.raises(ConfigError, match=r"0.tar: not a whole tar, it breaks off after 0 whole samples"):
        build_index([pax(tmp_path / "0.tar", size=size)])


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A raw ustar header whose field of 12 bytes for the size is `size`."""
    block = bytearray(tarfile.TarInfo(name).tobuf())
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size",
    [
        b"77777777777\0",  # 8 GiB
        b"\x80" + bytes(3) + struct.pack(">Q", 2**62),  # base 256
        b"\x80" + b"\xff" * 11,  # 2^88 - 1
        b"\xff" * 12,  # -1
        b"\xff" * 10 + b"\xfc\x00",  # -1024
    ],
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
def test_sizes_of_headers_are_not_believed(tmp_path, size, kind):
    """Of a member, of pax records and of a long name: nothing of that size is allocated, nothing goes on for ever."""
    path = tmp_path / "0.tar"
    path.write_bytes(
        header("a.jpg", size, kind) + b"1".ljust(512, b"\0") + header("b.jpg", b"00000000000\0") + bytes(1024)
    )
    tracemalloc.start()
    with pytest.raises(ConfigError, match="0.tar: not a whole tar"):
        build_index([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_endless_chains_of_headers_end(tmp_path, kind):
    """Each one announces the next; tarfile follows them by recursion."""
    path = tmp_path / "0.tar"
    path.write_bytes((header("p", b"00000000012\0", kind) + b"10 a=bcdef\n".ljust(512, b"\0")) * 5000 + bytes(1024))
    with pytest.raises(ConfigError, match="0.tar: not a whole tar"):
        build_index([path])


def test_a_map_of_holes_without_end_is_refused(tmp_path):
    """A sparse member (GNU 1.0) lists its pieces in its own data, which tarfile reads until there are enough."""
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": "1",
        "GNU.sparse.name": "a",
    }
    path = tar_of(tmp_path / "0.tar", (info, b"99999999\n1\n"), format=tarfile.PAX_FORMAT)
    with pytest.raises(ConfigError, match="0.tar: not a whole tar"):
        build_index([path])


def test_memory_per_member_is_bounded(tmp_path):
    """tarfile alone keeps more than 1,000 bytes of each; the index keeps its keys, offsets and sizes."""
    path, members = tmp_path / "0.tar", 20_000
    names = (f"{i // 2:08d}.{'txt' if i % 2 else 'jpg'}" for i in range(members))
    path.write_bytes(b"".join(tarfile.TarInfo(name).tobuf() for name in names) + bytes(1024))
    tracemalloc.start()
    build_index([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(keys(path)) == members // 2
    assert peak < 600 * members


@pytest.mark.parametrize(("name", "value"), [("sizes", 2**62), ("sizes", -1), ("offsets", 2**62), ("offsets", 20_000)])
def test_an_index_from_elsewhere_is_not_believed(make_shards, name, value):
    """Sidecars may be fetched with the tars: what they place lies inside the tar, so no read is larger than it."""
    folder = make_shards([2])
    sidecar = folder / "0000.idx.npz"
    with np.load(sidecar) as arrays:
        changed = dict(arrays)
    changed[name][0, 0] = value
    np.savez(sidecar, **changed)
    with pytest.raises(ConfigError, match="0000.idx.npz: places members outside of the tar"):
        index._load_shard(folder / "0000.tar", [("jpg",), ("txt",)])


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey image of zeros, a thousand times smaller than its pixels, with further chunks before them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    first = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compressobj(1)
    pixels = b"".join(rows.compress(bytes(width + 1)) for _ in range(height)) + rows.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + first
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(100_000, 1_000), (20_000, 5_000)])
def test_a_bomb_of_pixels_is_refused(width, height):
    """A hundred million pixels in a hundred kilobytes: a bad sample, before they are unpacked."""
    bomb = png(width, height)
    assert len(bomb) < width * height / 100
    tracemalloc.start()
    with pytest.raises(BadSample, match="DecompressionBombWarning"):
        decode(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_very_long_image_is_an_image(tmp_path):
    """100,000 pixels wide and few in all: only what would fill the memory is refused."""
    assert decode(png(100_000, 10)).size == (100_000, 10)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_of_text_is_refused(kind):
    """Compressed metadata, of which 4 KB would unpack to 4 MB, like the one in every thousandth image of the web."""
    bomb = png(8, 8, (kind, b"key\0\0" + zlib.compress(bytes(4 * 2**20))))
    tracemalloc.start()
    try:
        decode(bomb)
    except BadSample:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
def test_a_header_of_pixels_without_pixels_is_refused(fill):
    """The size that a header claims is not what there is."""
    lie = png(64, 64)
    lie = lie[:16] + struct.pack(">II", 9_000, 9_000) + lie[24:]
    lie = lie[:29] + struct.pack(">I", zlib.crc32(lie[12:29])) + lie[33:]
    with pytest.raises(BadSample):
        decode(lie)
    with pytest.raises(BadSample):
        decode(lie[:40] + fill * 2000)
